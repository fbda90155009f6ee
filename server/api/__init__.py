"""OpenAI's protocol over HTTP: wire models, one file per endpoint family, server-sent events."""
