"""The libraries' own tests, on models that are patched: `python -m tests.peers`."""
