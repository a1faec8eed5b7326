"""Kubernetes as an engine, by its schemas: what is to be applied to a cluster. Nothing here speaks to one."""
