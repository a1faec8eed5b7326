"""Writing and reading shards on a real S3: this library, its peers and the physical floor (docs/benchmarks.md)."""
