"""Requests per second and their latency, beside `mlflow models serve` (docs/benchmarks.md)."""
