"""Measurements. Run one from the repository root: `python -m benchmarks.serving.retrieval`."""
