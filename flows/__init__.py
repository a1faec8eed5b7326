"""What happens in which order: the pipeline, its hooks, and the command line."""
