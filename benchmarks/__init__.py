"""What the client costs, against what one would write by hand. Run with ``python -m benchmarks``."""
