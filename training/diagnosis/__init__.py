"""Which record makes a step fail, or kills a worker."""
