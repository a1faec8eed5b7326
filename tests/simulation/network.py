"""Links between agents as the shells keep them: TCP, so in order and without loss, until a side gives them up.

A dead process closes its links at once if the other end can be reached; a cut, or a machine without power, shows only
by silence. Shells try again and again to link with whom they are not linked with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.cluster.protocol import Heard, Linked, Status, Unlinked

if TYPE_CHECKING:
    from tests.simulation.agent import SimulatedAgent
    from tests.simulation.world import World


class Connection:
    """One TCP connection, from the view of one end: what it sends arrives at `there`, one after the other."""

    __slots__ = ("held", "here", "last_arrival", "number", "there")

    def __init__(self, here: SimulatedAgent, there: SimulatedAgent, number: int) -> None:
        self.here = here
        self.there = there
        self.number = number
        self.last_arrival = 0.0
        self.held: list[Status | None] = []
        """What waits for a cut to heal; None is the end of the connection."""


class Network:
    __slots__ = ("_cuts", "_number", "_world")

    def __init__(self, world: World) -> None:
        self._world = world
        self._number = 0
        self._cuts: dict[tuple[int, int], int] = {}
        """How many faults cut this direction between two hosts."""

    # ---- cuts ----------------------------------------------------------------------------------------------------

    def carries(self, source: int, target: int) -> bool:
        return not self._cuts.get((source, target))

    @property
    def is_whole(self) -> bool:
        return not self._cuts

    def is_open(self, one: int, other: int) -> bool:
        return not self._cuts or (self.carries(one, other) and self.carries(other, one))

    def cut(self, directions: list[tuple[int, int]]) -> None:
        for direction in directions:
            self._cuts[direction] = self._cuts.get(direction, 0) + 1

    def heal(self, directions: list[tuple[int, int]]) -> None:
        for direction in directions:
            self._cuts[direction] -= 1
            if not self._cuts[direction]:
                del self._cuts[direction]
        for agent in self._world.agents:
            for connection in list(agent.links.values()):
                self._release(connection)
            for connection in agent.closing:
                self._release(connection)
        self.dial_all()

    def _release(self, connection: Connection) -> None:
        if connection.held and self.carries(connection.here.host, connection.there.host):
            held, connection.held = connection.held, []
            for maybe_status in held:  # before what is on its way
                self._arrive(connection, maybe_status)

    # ---- links ---------------------------------------------------------------------------------------------------

    def dial_all(self) -> None:
        living = [agent for agent in self._world.agents if agent.is_alive]
        for number, one in enumerate(living):
            for other in living[:number]:
                self.dial(one, other)

    def dial(self, one: SimulatedAgent, other: SimulatedAgent) -> None:
        if one.name not in other.links or other.name not in one.links:
            self._world.plan(0.05 + 0.6 * self._world.random(), self._connect, one, other)

    def _connect(self, one: SimulatedAgent, other: SimulatedAgent) -> None:
        """A handshake needs both ends. It makes no second link, but renews one that an end has given up."""
        are_there = one.is_alive and other.is_alive and not one.is_frozen and not other.is_frozen
        if not are_there or not self.is_open(one.host, other.host):
            return  # heal and wake dial again
        if other.name in one.links and one.name in other.links:
            return
        self._number += 1
        for here, there in ((one, other), (other, one)):
            is_new = there.name not in here.links
            here.links[there.name] = Connection(here, there, self._number)
            if is_new:
                here.linked_since = self._world.agenda.now
                here.deliver(Linked(incarnation=there.name))

    def tell(self, sender: SimulatedAgent, status: Status) -> None:
        for connection in sender.links.values():
            self._send(connection, status)

    def close(self, here: SimulatedAgent, name: str) -> None:
        """`here` closes its end; the other is told if it can be reached, or once it can."""
        connection = here.links.pop(name, None)
        if connection is not None:
            here.closing.append(connection)
            self._send(connection, None)
            self.dial(here, connection.there)

    def drop_without_a_word(self, agent: SimulatedAgent) -> None:
        """Its machine is gone."""
        agent.links.clear()
        agent.closing.clear()

    def _send(self, connection: Connection, maybe_status: Status | None) -> None:
        world = self._world
        delay = 0.005 + world.network_delay * world.random()
        connection.last_arrival = max(connection.last_arrival, world.agenda.now + delay)
        world.plan(connection.last_arrival - world.agenda.now, self._arrive, connection, maybe_status)

    def _arrive(self, connection: Connection, maybe_status: Status | None) -> None:
        here, there = connection.here, connection.there
        if not there.is_alive:
            return
        if connection.held or not self.carries(here.host, there.host):
            connection.held.append(maybe_status)
            return
        maybe_other = there.links.get(here.name)
        if maybe_other is None or maybe_other.number != connection.number:
            return  # that end was given up
        if maybe_status is not None:
            there.deliver(Heard(status=maybe_status))
        else:
            del there.links[here.name]
            there.deliver(Unlinked(incarnation=here.name))
            self.dial(there, here)
