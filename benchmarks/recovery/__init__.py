"""What failures cost: goodput of recovery policies, simulated over node counts (docs/benchmarks.md)."""
