"""The membership protocol, with the real `training.cluster.node.Node`, in a simulated world (docs/recovery.md)."""
