"""Prometheus and Alertmanager: rules, windows, and how both are configured."""
