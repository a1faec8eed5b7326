"""Bugs planted in the real source of the parameter server: each replaces a text that is there exactly once."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from training.servers import client, replica


@dataclass(frozen=True, kw_only=True)
class Planted:
    name: str
    module: ModuleType
    old: str
    new: str

    def classes(self) -> dict[str, Any]:
        """What a `World` is made with."""
        source = inspect.getsource(self.module)
        assert source.count(self.old) == 1, self.name
        changed: dict[str, Any] = {"__name__": f"{self.module.__name__}_planted"}
        exec(
            compile(source.replace(self.old, self.new), self.module.__file__ or "", "exec", dont_inherit=True), changed
        )
        if self.module is client:
            return {"make_client": changed["Client"]}
        return {"make_replica": changed["Replica"]}


def _replica(name: str, old: str, new: str) -> Planted:
    return Planted(name=name, module=replica, old=old, new=new)


def _client(name: str, old: str, new: str) -> Planted:
    return Planted(name=name, module=client, old=old, new=new)


PLANTED = (
    _replica(
        "a primary acknowledges before its backups have it",
        "return all(reached >= position for reached in self._positions.values())",
        "return True",
    ),
    _replica("an older token is not refused", "if message.token < self.token:", "if False:"),
    _replica(
        "a step that was applied is added up again",
        "isinstance(message, Push) and message.step == self.state.step + 1 and self._maybe_total is None",
        "isinstance(message, Push) and self._maybe_total is None",
    ),
    _replica("what an older group gathered is kept", "self._parts: dict[Subtree, Any] = {}", "pass"),
    _replica(
        "a new primary does not ask who is ahead",
        "if self._standings.get(ahead, -1) > self.position:",
        "if False:",
    ),
    _replica(
        "a total that is held is forgotten at a new token",
        "        self._forget_group()\n        if",
        "        self._forget_group()\n        self._maybe_total = None\n        if",
    ),
    _replica(
        "a backup applies a step again",
        "        if message.step == self.state.step + 1:\n            assert",
        "        if True:\n            assert",
    ),
    _replica("a new backup is not filled", "sends.append(self._copy_to(name))", "self._positions[name] = position"),
    _replica(
        "parts are added up in the order of their arrival",
        "sorted(self._parts.items(), key=lambda part: part[0].start)",
        "list(self._parts.items())",
    ),
    _client(
        "a worker decides before all shards hold their totals",
        "if len(self._answers) < len(self._primaries):",
        "if len(self._answers) < 1:",
    ),
    _client("a worker hears other tokens", "message.token != self.token or ", ""),
    _client("a worker decides anew what a shard has applied", "if isinstance(answer, Decided):", "if False:"),
)
