"""Where a run of ever more nodes meets its first limit: each limit a question to one number of nodes.

Costs of messages are measured ones (messages.py, on the machine that docs/scale.md names), limits of S3 are AWS's:
https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks.scale.model import FOLLOWERS_SAMPLES_SECONDS, POLL_SECONDS, Run, commit, load, look_for_places
from training.cluster.links import MAX_LINE_BYTES
from training.cluster.protocol import Timing
from training.data.ledger import MAX_VIRTUAL_WORKERS

BEATS_PER_SECOND = round(1 / Timing().beat)
MESSAGE_NANOSECONDS, MESSAGE_NODE_NANOSECONDS = 130_000, 1_000
"""CPU of one message among few nodes, and for each node more: sent, received, proven, parsed, and decided upon."""
CHOOSE_SQUARE_PICOSECONDS = 190_000
"""And of each while a node is idle, for each pair of nodes: it chooses the next group anew."""
CHANGE_TELLINGS = 5
"""How often each agent tells all others that something is new with it, in one change of the group."""
MESSAGE_BYTES, REACHED_BYTES = 281, 35
SECOND = 10**9
DESCRIPTORS, OWN_DESCRIPTORS = 1_024, 20
"""What Linux allows a process by default, and what an agent has beside one connection with each other one."""
GETS_PER_SECOND = 5_500
"""Of S3, for a prefix that it has not split."""
REQUEST_MILLISECONDS = 15
"""Assumed for a small one: not measured here, where the store is on loopback."""
START_SECONDS, CHANGE_SECONDS = 10, 1
"""That an agent may be busy with finding all others (launch.join_seconds, as it is by default), and with a change."""
MOST_NODES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limit:
    """`is_within` holds up to some number of nodes, and no more beyond it."""

    name: str
    is_within: Callable[[Run], bool]
    lifted_by: str


def messages_per_second(num_nodes: int) -> int:
    """Between all agents of a group at rest."""
    return num_nodes * (num_nodes - 1) * BEATS_PER_SECOND


def message_bytes(num_nodes: int) -> int:
    return MESSAGE_BYTES + REACHED_BYTES * (num_nodes - 1)


def message_nanoseconds(num_nodes: int) -> int:
    return MESSAGE_NANOSECONDS + MESSAGE_NODE_NANOSECONDS * num_nodes


def idle_message_nanoseconds(num_nodes: int) -> int:
    """While the next group is to be found."""
    return message_nanoseconds(num_nodes) + CHOOSE_SQUARE_PICOSECONDS * num_nodes**2 // 1_000


def agent_nanoseconds_per_second(num_nodes: int) -> int:
    """CPU of one agent at rest."""
    return BEATS_PER_SECOND * (num_nodes - 1) * message_nanoseconds(num_nodes)


def idle_nanoseconds_per_second(num_nodes: int) -> int:
    """And while its node is idle."""
    return BEATS_PER_SECOND * (num_nodes - 1) * idle_message_nanoseconds(num_nodes)


def change_nanoseconds(num_nodes: int) -> int:
    """CPU of one agent for what is told in one change of the group; in half of it the node is idle."""
    half = CHANGE_TELLINGS * (num_nodes - 1) // 2
    return half * (message_nanoseconds(num_nodes) + idle_message_nanoseconds(num_nodes))


def start_messages(num_nodes: int) -> int:
    """That one agent hears while all link with all: each tells of each new link to those that it has."""
    return num_nodes * (num_nodes - 1) // 2


def start_nanoseconds(num_nodes: int) -> int:
    """CPU of one agent for these; half of the nodes are there then, on average."""
    return start_messages(num_nodes) * idle_message_nanoseconds(num_nodes // 2)


def num_descriptors(num_nodes: int) -> int:
    """Of an agent."""
    return OWN_DESCRIPTORS + num_nodes - 1


LIMITS = (
    Limit(
        name="statuses take an idle agent's whole core: it falls behind, and groups form late",
        is_within=lambda run: idle_nanoseconds_per_second(run.num_nodes) <= SECOND,
        lifted_by="a choice made once for all that has come, if anything changed",
    ),
    Limit(
        name=f"what is told in a change of the group takes an agent {CHANGE_SECONDS} s of CPU",
        is_within=lambda run: change_nanoseconds(run.num_nodes) <= CHANGE_SECONDS * SECOND,
        lifted_by="the same",
    ),
    Limit(
        name="statuses take the whole core of an agent whose node trains",
        is_within=lambda run: agent_nanoseconds_per_second(run.num_nodes) <= SECOND,
        lifted_by="watchers instead of all-to-all",
    ),
    Limit(
        name=f"linking all with all takes an agent {START_SECONDS} s of CPU",
        is_within=lambda run: start_nanoseconds(run.num_nodes) <= START_SECONDS * SECOND,
        lifted_by="statuses that do not list whom they reach",
    ),
    Limit(
        name=f"each agent reads each other's place: {START_SECONDS} s of S3's GETs a look",
        is_within=lambda run: (
            run.num_nodes * look_for_places(run.num_nodes).num_gets <= START_SECONDS * GETS_PER_SECOND
        ),
        lifted_by="places in the keys of the listing",
    ),
    Limit(
        name="the follower asks for each node's samples, one request after the other, longer than they are apart",
        is_within=lambda run: 2 * run.num_nodes * REQUEST_MILLISECONDS <= 1_000 * FOLLOWERS_SAMPLES_SECONDS,
        lifted_by="one listing tells what is new; chunks of many nodes",
    ),
    Limit(
        name=f"an agent has {DESCRIPTORS:,} descriptors",
        is_within=lambda run: num_descriptors(run.num_nodes) <= DESCRIPTORS,
        lifted_by="watchers instead of all-to-all",
    ),
    Limit(
        name="a rank's place among 65,536 virtual workers",
        is_within=lambda run: run.num_ranks <= MAX_VIRTUAL_WORKERS,
        lifted_by="a ledger of half bytes",
    ),
    Limit(
        name="old checkpoints are deleted one object after the other, slower than new ones come",
        is_within=lambda run: (
            commit(run).num_deletes * REQUEST_MILLISECONDS * run.checkpoints_per_hour <= 3_600 * 1_000
        ),
        lifted_by="few parts; a thousand deletions a request",
    ),
    Limit(
        name="looks at the record: S3's GETs of one object",
        is_within=lambda run: run.num_nodes <= GETS_PER_SECOND * POLL_SECONDS,
        lifted_by="the first member alone looks often",
    ),
    Limit(
        name="a status is longer than a line may be",
        is_within=lambda run: message_bytes(run.num_nodes) <= MAX_LINE_BYTES,
        lifted_by="statuses that do not list whom they reach",
    ),
    Limit(
        name="all ranks load all parts of a checkpoint: an hour of S3's GETs",
        is_within=lambda run: load(run).num_gets * run.num_ranks <= 3_600 * GETS_PER_SECOND,
        lifted_by="one rank loads a part, and sends it on",
    ),
)


def most_nodes(limit: Limit, run: Run) -> int | None:
    """The largest number within it; None if there is none up to a million."""
    low, high = 0, MOST_NODES
    if limit.is_within(replace(run, num_nodes=high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if limit.is_within(replace(run, num_nodes=middle)) else (low, middle)
    return low


def in_order(run: Run) -> Iterator[tuple[int, Limit]]:
    """Those that are met, the first first."""
    met = ((most_nodes(limit, run), limit) for limit in LIMITS)
    yield from sorted(((most, limit) for most, limit in met if most is not None), key=lambda found: found[0])
