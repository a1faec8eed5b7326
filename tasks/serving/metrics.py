"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tasks.lifecycle.model_file import KeptVersion

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All of one front: it sees every request."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("unbroken_serving_requests", "Requests", ["status"], registry=registry)
        self.seconds = Histogram(
            "unbroken_serving_seconds", "From a request's body to its answer", registry=registry, buckets=SECONDS
        )
        self.rows = Counter("unbroken_serving_rows", "Rows predicted", registry=registry)
        self.batch_rows = Histogram(
            "unbroken_serving_batch_rows", "Rows that went through the model with a request's own",
            registry=registry, buckets=ROWS,
        )  # fmt: skip
        self.tries_again = Counter(
            "unbroken_serving_tries_again", "Requests asked of another replica", registry=registry
        )
        self.deaths = Counter("unbroken_serving_replica_deaths", "Replicas that ended", registry=registry)
        self.replicas = Gauge("unbroken_serving_replicas_ready", "Replicas that serve", registry=registry)
        self.switches = Counter("unbroken_serving_switches", "Changes of version", registry=registry)
        self.refusals = Counter("unbroken_serving_refusals", "Champions that could not be served", registry=registry)
        self.is_behind = Gauge("unbroken_serving_refused", "1 if the champion is refused, and the one before serves", registry=registry)  # fmt: skip # noqa: E501
        self.store_away = Gauge("unbroken_serving_store_away", "1 if the store did not answer last", registry=registry)
        self._version = Gauge(
            "unbroken_serving_version", "1 for what is served", ["model", "version", "model_sha256"], registry=registry
        )

    def show_version(self, kept: KeptVersion) -> None:
        self._version.clear()
        self._version.labels(kept.model, kept.version, kept.model_sha256).set(1)

    def text(self) -> bytes:
        return generate_latest(self._registry)
