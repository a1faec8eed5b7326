"""The built-in workloads. Each file is a complete example of a recipe."""
