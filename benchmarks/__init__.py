"""Benchmarks of the client against hand-written code. Run with ``python -m benchmarks``."""
