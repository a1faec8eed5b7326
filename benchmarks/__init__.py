"""Measurements that may be repeated: `make bench`."""
