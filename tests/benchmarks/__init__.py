"""Long measurements, one module each; `make bench` or `python -m tests.benchmarks [NAME...]` runs them."""
