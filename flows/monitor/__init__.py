"""The monitor: what Prometheus reads of runs and servers, and where Alertmanager's messages become Prefect events."""
