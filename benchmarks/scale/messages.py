"""What one message costs an agent, at any number of nodes: two real links and one real node, alone on a core.

An agent of `n` nodes tells and hears `n - 1` messages a beat; each says whom its sender reaches, and makes its reader
look at all of its peers. So no more than one agent is needed to know what it would do among 16,384.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from training.cluster.links import Links, Place
from training.cluster.node import Node, Peer
from training.cluster.protocol import Event, Heard, Phase, RecordSeen, Status, Timing
from training.documents import canonical_json
from training.runs.record import Member, Record

SECRET = "00" * 32
MOST_TO_CHOOSE = 1024  # beyond, one choice takes seconds
CPU_SECONDS = 0.2
"""How long each thing is done again and again."""


def member(node: int, port: int = 40_000) -> Member:
    return Member(node=node, incarnation=f"{node:032x}", address="10.0.0.1", port=port)


def status(node: int, num_nodes: int, phase: Phase = "training") -> Status:
    """Of one that reaches all others."""
    return Status(
        member=member(node),
        token=1,
        phase=phase,
        reaches=tuple(f"{other:032x}" for other in range(num_nodes) if other != node),
        sees_store=True,
        is_leaving=False,
        step=0,
        maybe_departure=None,
    )


def node_of_all(num_nodes: int, phase: Phase) -> Node:
    """The last of a group that all are in; or, idle, of one that all were in, and whose next the first will propose."""
    own = num_nodes - 1
    node = Node(
        me=member(own),
        num_nodes=num_nodes,
        min_nodes=1,
        generation=0,
        max_restarts=0,
        timing=Timing(),
        since=0.0,
    )
    of_all = status(num_nodes, num_nodes, phase)
    node.peers = {
        f"{number:032x}": Peer(heard_at=0.0, first_heard_at=0.0, maybe_status=replace(of_all, member=member(number)))
        for number in range(own)
    }
    port = member(own).port if phase == "training" else 39_999
    members = tuple(member(number, port) for number in range(num_nodes))
    node.handle(RecordSeen(maybe_record=Record(key="k", token=1, members=members, num_nodes=num_nodes)), 0.0)
    assert (node.phase, node._is_asking) == (phase, False)
    return node


def seconds_each(do: Callable[[], object]) -> float:
    """CPU of one call."""
    count, began = 0, time.process_time()
    while (spent := time.process_time() - began) < CPU_SECONDS:
        do()
        count += 1
    return spent / count


def seconds_to_tell(num_nodes: int) -> float:
    """What a beat costs once, however many hear it."""
    told = status(0, num_nodes)
    return seconds_each(lambda: canonical_json(asdict(told)))


def seconds_to_decide(num_nodes: int, phase: Phase = "training") -> float:
    """What the node makes of one message that says nothing new. An idle one chooses the next group each time."""
    node, heard = node_of_all(num_nodes, phase), Heard(status=status(0, num_nodes, phase))
    return seconds_each(lambda: node.handle(heard, 0.05))


async def seconds_on_the_way(num_nodes: int) -> float:
    """To send one message, receive, prove and parse it; both ends are this process."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    sender, told = f"{0:032x}", status(0, num_nodes)
    one, other = (Links(name, secret=SECRET, on_event=events.put_nowait) for name in (sender, f"{1:032x}"))
    place = Place(node=1, incarnation=f"{1:032x}", address="127.0.0.1", port=await other.listen("127.0.0.1"))
    one.dial({1: place})
    for _ in range(2):
        await events.get()  # linked
    count, began = 0, time.process_time()
    while (spent := time.process_time() - began) < CPU_SECONDS:
        one.tell(told)
        await asyncio.wait_for(events.get(), 60.0)  # as the agent does
        count += 1
    await one.close()
    await other.close()
    return spent / count - seconds_to_tell(num_nodes)


def measure(num_nodes: int) -> dict[str, Any]:
    """Microseconds of CPU; and the bytes of a message."""
    return {
        "num_nodes": num_nodes,
        "tell_microseconds": 1e6 * seconds_to_tell(num_nodes),
        "decide_microseconds": 1e6 * seconds_to_decide(num_nodes),
        "choose_microseconds": 1e6 * seconds_to_decide(num_nodes, "idle") if num_nodes <= MOST_TO_CHOOSE else None,
        "way_microseconds": 1e6 * asyncio.run(seconds_on_the_way(num_nodes)),
        "message_bytes": len(canonical_json(asdict(status(0, num_nodes)))) + 66,
    }
