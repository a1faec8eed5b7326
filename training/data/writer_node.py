"""One of several nodes that shard a source together: it leaves shards and receipts, and a single writer the manifest.

Which partitions are whose is arithmetic. A node that dies leaves nothing half done: whoever comes next does the rest.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TypeVar

from training.config import Preset
from training.data.lease import writing
from training.data.source import open_source
from training.data.withdrawn import withdrawn_records
from training.data.writer import NUM_AT_ONCE, Writer
from training.documents import canonical_json, parse, read_document, sha256_hex
from training.errors import UnbrokenError
from training.processes import die_with
from training.recipe import load_recipe
from training.runs.job import location_from
from training.s3.objectstore import Store, StoreLocation

Item = TypeVar("Item")
log = logging.getLogger("training.data.writer_node")


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What `num_nodes` nodes shard together, as a JSON document without secrets."""

    preset: Preset
    location: StoreLocation
    num_nodes: int


def store_sharing(store: Store, sharing: Sharing) -> str:
    """Put it where nodes find it; returns its digest."""
    data = canonical_json(asdict(sharing))
    digest = sha256_hex(data)
    store.put_immutable(sharing_key(sharing.preset.data.name, digest), data)
    return digest


def sharing_key(dataset: str, digest: str) -> str:
    return f"datasets/{dataset}/sharing/{digest}.json"


def node_command(dataset: str, digest: str) -> tuple[str, ...]:
    """How an engine starts node `{node}`."""
    return (sys.executable, "-P", "-m", "training.data.writer_node", "{node}", dataset, digest)


def share_of(items: Sequence[Item], *, node: int, num_nodes: int) -> Sequence[Item]:
    """Every `num_nodes`-th one, so that large files that lie side by side are dealt out."""
    return items[node::num_nodes]


def write_share(store: Store, sharing: Sharing, *, node: int) -> int:
    """Shard this node's partitions, unless they are finished. Returns how many shards it sent."""
    preset = sharing.preset
    source = open_source(preset.data, folder=preset.folder, location=sharing.location)
    withdrawn = withdrawn_records(store, preset.data.name)
    writer = Writer(store, source, preset.data, load_recipe(preset), withdrawn=withdrawn)
    with writing(store, preset.data.name), ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        results = list(pool.map(writer.write, share_of(writer.parts, node=node, num_nodes=sharing.num_nodes)))
    num_sent = sum(result.num_shards_sent for result in results)
    log.info("node %d: %d partitions, %d shards sent", node, len(results), num_sent)
    return num_sent


def main() -> None:
    """`python -m training.data.writer_node NODE DATASET SHARING`; the store's location is in the environment."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)
    node, dataset, digest = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    die_with(os.getppid())
    location = location_from(os.environ)
    assert location is not None, "nodes are started by the engine, which says where the store is"
    store = Store(location)
    try:
        document = store.get_proven(sharing_key(dataset, digest), sha256=digest)
        write_share(store, parse(Sharing, read_document(document, what="a plan of sharding")), node=node)
    except UnbrokenError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
