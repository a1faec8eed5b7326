"""The membership protocol, with the real `training.node.Node`, in a simulated world (docs/recovery.md)."""
