"""Who pushes gradients and gets parameters: one per file."""
