"""Raw records to content-addressed shards, and shards to batches in an order that is arithmetic."""
