"""What one run costs by its number of nodes, and where it stops (docs/scale.md)."""
