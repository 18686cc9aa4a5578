"""Examples whose answers are known exactly: `python pipelines/generate.py toy=NAME`."""
