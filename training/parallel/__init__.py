"""A model over several ranks: sharded state, and what layouts cost (docs/parallelism.md)."""
