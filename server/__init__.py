"""An OpenAI-compatible inference server for contexts that do not fit on the GPU."""
