"""`python -m tests.servers.process CONFIG`: one server or worker, told what to do by JSON lines on its standard input.

It says where it listens, and a worker says each step that it has heard to be done. It begins none after `until`.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from tests.servers.test_arithmetic import CLIP, SIZES, Net, V, adamw, elements, sums
from training.arithmetic.reduce import owned_range
from training.documents import sha256_hex
from training.servers import mesh as mesh_module
from training.servers.arithmetic import TensorState, decide
from training.servers.endpoints import Begun, PrimaryLost, Remote, Server
from training.servers.layout import shards
from training.servers.mesh import Mesh
from training.servers.protocol import Assignment
from training.servers.replica import Replica

MAX_BYTES = 1 << 26


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


class Gate:
    """How far workers may go."""

    def __init__(self) -> None:
        self._until, self._changed = 0, threading.Condition()

    def open(self, until: int) -> None:
        with self._changed:
            self._until = until
            self._changed.notify_all()

    def wait(self, step: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: step <= self._until)


def orders(gate: Gate) -> Iterator[dict[str, Any]]:
    """To begin with another group. In between, it may be told to go on."""
    for line in sys.stdin:
        found: dict[str, Any] = json.loads(line)
        gate.open(found["until"])
        if "places" not in found:
            continue
        found["places"] = {name: (host, port) for name, (host, port) in found["places"].items()}
        yield found


def be_server(mesh: Mesh, shard: int, num_shards: int, *, is_filled: bool) -> None:
    net = Net()
    state = TensorState(adamw(net), list(net.parameters()), shards(SIZES, num_shards)[shard])
    replica = Replica(mesh.name, state, num_virtual_workers=V)
    if is_filled:
        replica.fill()
    server = Server(mesh, replica)
    say(address=mesh.address)  # it hears from now on
    for order in orders(Gate()):
        primary, *backups = order["replicas"][shard]
        assignment = Assignment(token=order["token"], primary=primary, backups=tuple(backups))
        server.begin(Begun(assignment=assignment, places=order["places"]))


def be_worker(mesh: Mesh, num_shards: int, num_steps: int) -> None:
    waiting: queue.SimpleQueue[tuple[Remote, range]] = queue.SimpleQueue()
    gate, maybe_remote = Gate(), None
    threading.Thread(target=train, args=(waiting, gate, num_shards, num_steps), daemon=True).start()
    say(address=mesh.address)
    for order in orders(gate):
        if maybe_remote is not None:
            maybe_remote.give_up()
        maybe_remote = Remote(
            mesh,
            token=order["token"],
            primaries=[replicas[0] for replicas in order["replicas"]],
            places=order["places"],
            decide=partial(decide, clip_norm=CLIP, learning_rate_scale=1.0),
        )
        place = order["workers"].index(mesh.name)
        waiting.put((maybe_remote, owned_range(place, len(order["workers"]), V)))


def train(waiting: queue.SimpleQueue[tuple[Remote, range]], gate: Gate, num_shards: int, num_steps: int) -> None:
    """In one group after another."""
    all_shards = shards(SIZES, num_shards)
    while True:
        remote, leaves = waiting.get()
        try:
            step, values = remote.pull()
            while step < num_steps:
                step += 1
                gate.wait(step)
                parts = sums(step, leaves, torch.cat(values))
                _, values = remote.step(step, [[(t, elements(v, one)) for t, v in parts] for one in all_shards])
                say(step=step)
            say(digest=hash_of(torch.cat(values)))
        except PrimaryLost as error:
            say(lost=str(error))


def hash_of(tensor: torch.Tensor) -> str:
    return sha256_hex(tensor.numpy().tobytes())


def main() -> None:
    torch.set_num_threads(1)
    config = json.loads(sys.argv[1])
    mesh_module.HANDSHAKE_SECONDS = 100.0  # who is slow is not lost
    mesh = Mesh(config["name"], secret="s", address="127.0.0.1", max_bytes=MAX_BYTES)
    if config["role"] == "server":
        be_server(mesh, config["shard"], config["num_shards"], is_filled=config["is_filled"])
    else:
        be_worker(mesh, config["num_shards"], config["num_steps"])


if __name__ == "__main__":
    main()
