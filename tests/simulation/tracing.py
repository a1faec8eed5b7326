"""What a person reads of a schedule: one line for each thing that matters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.cluster.protocol import Action, AskWorkers, Event, Heard, Leave, Propose, RecordSeen, StartWorkers, Tick
from training.runs.record import Record

if TYPE_CHECKING:
    from tests.simulation.agent import SimulatedAgent
    from tests.simulation.clock import Agenda


class Tracing:
    """Lines of text, if wanted: schedules run by the thousand write none."""

    agenda: Agenda

    def __init__(self, *, tracing: bool) -> None:
        self.tracing = tracing
        self.lines: list[str] = []

    def trace(self, who: str, what: str) -> None:
        if self.tracing:
            self.lines.append(f"{self.agenda.now:8.3f}  {who:<5} {what}")

    def trace_event(self, agent: SimulatedAgent, event: Event) -> None:
        """Ticks, and statuses that say nothing new, are left out."""
        match event:
            case Tick():
                return
            case Heard(status=status):
                maybe_peer = agent.node.peers.get(status.member.incarnation)
                if maybe_peer is None or maybe_peer.maybe_status == status:
                    return
                flags = ("" if status.sees_store else " without S3") + (" leaving" if status.is_leaving else "")
                text = f"{status.phase}, token {status.token}, reaches {status.reaches}{flags}"
                self.trace(agent.name, f"hears {status.member.incarnation}: {text}")
            case RecordSeen(maybe_record=None):
                self.trace(agent.name, "S3 is away")
            case RecordSeen(maybe_record=record) if record is not None:
                if record != agent.node.maybe_record:
                    self.trace(agent.name, f"sees the record: {describe(record)}")
            case _:
                self.trace(agent.name, f"event {event}")

    def trace_action(self, agent: SimulatedAgent, action: Action) -> None:
        match action:
            case StartWorkers(record=record):
                text = f"starts workers of token {record.token}"
            case Propose(proposal=proposal):
                names = [member.incarnation for member in proposal.members]
                text = f"proposes {names} after token {proposal.expected_token}"
            case AskWorkers(to=to):
                text = f"asks its workers to {to}"
            case Leave():
                text = "leaves"
            case _:
                text = type(action).__name__
        self.trace(agent.name, f"-> {text}")

    def describe_change(self, before: Record, after: Record) -> str:
        return describe(after) if after.signs_of_life == before.signs_of_life else "a sign of life"


def describe(record: Record) -> str:
    names = ",".join(member.incarnation for member in record.members)
    steps = ",".join(f"{c.step}-{c.token}" for c in record.checkpoints)
    end = f" failure {record.failure.kind}" if record.failure else ""
    return f"token {record.token} [{names}] checkpoints [{steps}] resumed {record.resume_steps}{end}" + (
        " RESULT" if record.result else ""
    )
