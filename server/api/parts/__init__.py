"""What an answer's text consists of: content, reasoning, tool calls; one parser per way of writing them."""
