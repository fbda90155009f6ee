"""Parts of scripts/bench/index.py: where vectors come from, who is compared, what is measured, how it is shown."""
