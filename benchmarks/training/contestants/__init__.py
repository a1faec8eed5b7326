"""One file per contestant: how it does one step of the same training."""
