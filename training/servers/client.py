"""What a worker says to the primaries of all shards, as a state machine without input or output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from training.arithmetic.reduce import Subtree
from training.servers.protocol import Apply, Decided, Held, Message, Pull, Push, Send, Values

Phase = Literal["idle", "pushing", "applying", "pulling"]


class Client:
    """One of a group. `decide` makes one decision of the reports of all shards, the same in all workers.

    A worker that is asked to begin anew in another group pulls first; then, if all shards stand where its gradients
    belong, it sends these again.
    """

    def __init__(self, *, token: int, primaries: Sequence[str], decide: Callable[[Sequence[Any]], Any]) -> None:
        self.token = token
        self.phase: Phase = "idle"
        self.step = 0
        """In hand, or finished if idle."""
        self.maybe_decision: Any = None
        """Of that step."""
        self._primaries = tuple(primaries)
        self._decide = decide
        self._answers: dict[str, Message] = {}

    @property
    def is_waiting(self) -> bool:
        return self.phase != "idle"

    def pull(self, *, with_optimizer: bool = False) -> list[Send]:
        """Asks for the parameters, or for all that the shards hold."""
        self.phase = "pulling"
        return self._say(lambda shard: Pull(token=self.token, with_optimizer=with_optimizer))

    def push(self, step: int, shard: int, parts: Sequence[tuple[Subtree, Any]], maybe_said: Any = None) -> list[Send]:
        """The sums of this worker's subtrees for one shard; or, without any, what it says to the first. Each is
        answered only after that, so shards may have theirs in any order, and long after one another."""
        if (self.phase, self.step) != ("pushing", step):
            self.phase, self.step, self._answers = "pushing", step, {}
        message = Push(token=self.token, step=step, parts=tuple(parts), maybe_said=maybe_said)
        return [Send(to=self._primaries[shard], message=message)]

    def _say(self, message: Callable[[int], Message]) -> list[Send]:
        self._answers = {}
        return [Send(to=name, message=message(shard)) for shard, name in enumerate(self._primaries)]

    def handle(self, sender: str, message: Message) -> list[Send]:
        """Answers of another token are refused."""
        if message.token != self.token or not self._answers_me(message):
            return []
        self._answers[sender] = message
        if len(self._answers) < len(self._primaries):
            return []
        answers = [self._answers[name] for name in self._primaries]
        if self.phase == "pushing":
            self.phase = "applying"
            decision = self.maybe_decision = self._decision(answers)
            return self._say(lambda shard: Apply(token=self.token, step=self.step, decision=decision))
        self.phase = "idle"
        return []

    def _answers_me(self, message: Message) -> bool:
        """Whether it is what this phase waits for; an answer may come twice."""
        if self.phase == "pushing":
            return isinstance(message, Held | Decided) and message.step == self.step
        return isinstance(message, Values) and (self.phase == "pulling" or message.step == self.step)

    def _decision(self, answers: Sequence[Message]) -> Any:
        """A shard that has applied the step says with what; else the reports say it."""
        for answer in answers:
            if isinstance(answer, Decided):
                return answer.decision
        return self._decide([answer.report for answer in answers if isinstance(answer, Held)])

    def values(self) -> list[tuple[int, Any]]:
        """Of all shards, once idle: the step that each has applied, and its parameters. Steps differ only in a group
        that began in the midst of the second phase."""
        found = [self._answers[name] for name in self._primaries]
        return [(answer.step, answer.values) for answer in found if isinstance(answer, Values)]
