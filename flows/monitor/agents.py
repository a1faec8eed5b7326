"""What the agents of a run tell of their ranks and machines, asked of all at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from flows.monitor.view import NodeView, RankView
from infra.fetching import fetch
from training.cluster.links import Place
from training.errors import DamagedError

ANSWER_SECONDS = 1.0
MAX_NODES = 64
"""Those that are asked for one view, and shown in it."""
NUM_ASKED_AT_ONCE = 16
MAX_BYTES = 1 << 20
Numbers = Mapping[str, float]


def ask_agents(places: Sequence[Place]) -> tuple[NodeView, ...]:
    """The first `MAX_NODES` of these; one that does not answer is among them."""
    with ThreadPoolExecutor(NUM_ASKED_AT_ONCE) as pool:
        return tuple(pool.map(_ask, sorted(places, key=lambda place: place.node)[:MAX_NODES]))


def _ask(place: Place) -> NodeView:
    try:
        url = f"http://{place.address}:{place.metrics_port}/metrics"
        text = fetch(url, timeout=ANSWER_SECONDS, max_bytes=MAX_BYTES).decode(errors="replace")
        return node_view(place, text)
    except (OSError, DamagedError):  # it is gone, or something else has its port
        return NodeView(node=place.node, address=place.address, is_answering=False)


def node_view(place: Place, text: str) -> NodeView:
    """Raises `DamagedError` if the text is no page of an agent's metrics."""
    try:
        return _node_view(place, text)
    except Exception as error:  # whatever the parser of such pages makes of what is none
        raise DamagedError(f"what node {place.node} tells is no page of metrics: {error!r}") from error


def _node_view(place: Place, text: str) -> NodeView:
    from prometheus_client.parser import text_string_to_metric_families

    node: dict[str, float] = {}
    disks, gpus = [], []
    ranks: dict[int, dict[str, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            part, _, name = sample.name.removeprefix("unbroken_").partition("_")
            if part == "rank":
                ranks[int(sample.labels["rank"])][name] = sample.value
            elif name == "disk_free_bytes":
                disks.append(sample.value)
            elif name == "gpu_busy_ratio":
                gpus.append(sample.value)
            else:
                node[name] = sample.value
    memory = node.get("memory_bytes")
    return NodeView(
        node=place.node,
        address=place.address,
        is_answering=True,
        is_training=bool(node.get("training")),
        sees_store=bool(node.get("sees_store", 1)),
        num_peers=int(node.get("peers", 0)),
        memory_used_share=1 - node.get("memory_available_bytes", 0.0) / memory if memory else None,
        disk_free_bytes=min(disks, default=None),
        gpu_busy_share=sum(gpus) / len(gpus) if gpus else None,
        ranks=tuple(_rank_view(rank, numbers) for rank, numbers in sorted(ranks.items())),
    )


def _rank_view(rank: int, numbers: Numbers) -> RankView:
    def of_a_step(name: str) -> float | None:
        steps = numbers.get("steps_total")
        return numbers.get(name, 0.0) / steps if steps else None

    return RankView(
        rank=rank,
        step=int(numbers.get("step", 0)),
        loss=numbers.get("loss"),
        heard_at=numbers.get("heard_timestamp_seconds", 0.0),
        busy_seconds=of_a_step("pace_seconds_total"),
        collective_seconds=of_a_step("collective_seconds_total"),
        data_wait_seconds=of_a_step("data_wait_seconds_total"),
    )
