"""Training steps and checkpoints, beside other libraries and plain PyTorch."""
