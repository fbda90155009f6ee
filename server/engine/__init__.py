"""The engine: one thread that runs packed steps of prefill and decode over all running sequences."""
