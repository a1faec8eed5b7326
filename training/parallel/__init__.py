"""A model over several ranks: sharded state, pipelines, and what layouts cost (docs/parallelism.md)."""
