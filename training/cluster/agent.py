"""The node agent: training.cluster.node with sockets, processes and S3.

Placed by an engine, one per node. It imports no torch. Exit codes: 0 the run is finished (or somebody began it anew),
2 or 4 it failed for good, 75 this node was preempted, any other: start me again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

from training import errors
from training.cluster import membership
from training.cluster.links import Links, Place
from training.cluster.metrics import Situation, page_of, usual_port
from training.cluster.node import Node
from training.cluster.protocol import (
    Action,
    AskWorkers,
    Event,
    Leave,
    Preempted,
    Propose,
    ReadRecord,
    RecordSeen,
    Renew,
    StartWorkers,
    StopWorkers,
    Tell,
    Tick,
    Timing,
    Unlink,
    WorkersEnded,
)
from training.cluster.workers import Hand, Outcome, Workers, fork
from training.cluster.zygote import Zygote
from training.control import Order
from training.documents import canonical_json, parse, read_document
from training.errors import InfrastructureError, MissingError, UserError
from training.memory.slots import create_slots
from training.processes import die_with
from training.runs.exposition import serve
from training.runs.job import Job, location_from, read_job
from training.runs.record import Member, Record, RunRecord
from training.runs.system import SampleWriter, keep_sampling
from training.s3.objectstore import Store

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: start me again, elsewhere or later."""
LOOK_SECONDS = 1.0
"""Between two looks for other agents, while some are missing."""
WARM_UP_LOOK_SECONDS = 0.02
RESTART_PAUSE_SECONDS = 1.0  # the engine restarts at once: spare a store that is away
log = logging.getLogger("training.cluster.agent")


@dataclass(frozen=True, kw_only=True)
class Agent:
    """One node of one run."""

    job: Job
    node: int
    address: str
    zygote: Zygote

    def run(self) -> int:
        """Until the run is finished or has failed for good. Returns the exit code."""
        self.zygote.prepare()
        run = self.job.open_run()
        record = run.update(membership.with_secret)

        async def serve() -> int:
            return await _Shell(self, run, record).serve()

        return asyncio.run(serve())

    def exit_code(self, record: Record) -> int:
        """Always a final one: what is worth trying again, whoever follows the run starts again."""
        if record.generation != self.job.generation or record.failure is None:
            return 0
        log.error("the run failed: %s", record.failure.message)
        is_users = record.failure.kind == UserError.__name__
        return errors.UserError.exit_code if is_users else errors.DeterministicError.exit_code


class _Shell:
    """Does what the node says, and tells it what happens."""

    def __init__(self, agent: Agent, run: RunRecord, record: Record) -> None:
        launch = agent.job.preset.launch
        self._agent = agent
        self._run = run
        self._prefix = run.prefix(record)
        self._incarnation = uuid.uuid4().hex
        self._listener = self._bind()
        self._slots = [create_slots() for _ in range(launch.processes_per_node)]
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._links = Links(self._incarnation, secret=record.secret, on_event=self._events.put_nowait)
        self._places: dict[int, Place] = {}
        self._maybe_workers: Workers | None = None
        self._hands: dict[int, Hand] = {}
        """Processes that wait to be called, by local rank."""
        self._spares: dict[int, Hand] = {}
        self._maybe_code: int | None = None
        self._maybe_want: str | None = None
        self._moved_at = asyncio.get_running_loop().time()
        self._num_groups = 0
        self._departures: Counter[str] = Counter()
        self._pending: set[asyncio.Task[None]] = set()
        self._timing = Timing(silence=launch.silence_seconds, join=launch.join_seconds)
        self._node = Node(
            me=self._member(),
            num_nodes=launch.nodes,
            min_nodes=launch.min_nodes,
            nodes_per_replica=agent.job.preset.parallel.nodes_per_replica(launch),
            generation=agent.job.generation,
            max_restarts=launch.max_restarts,
            timing=self._timing,
            since=asyncio.get_running_loop().time(),
        )

    async def serve(self) -> int:
        """Returns the exit code."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._events.put_nowait, Preempted())
        port = await self._links.listen(self._agent.address)
        agent = self._agent
        metrics = await serve(agent.address, usual_port(agent.job.key, agent.node), self._metrics)
        looking = asyncio.create_task(self._keep_looking(port, metrics.sockets[0].getsockname()[1]))
        writer = SampleWriter(self._run.store, self._prefix, node=self._agent.node, incarnation=self._incarnation)
        sampling = asyncio.create_task(keep_sampling(writer))
        try:
            await self._warm_up()
            while self._maybe_code is None:
                event = await self._next_event()
                for action in self._node.handle(event, loop.time()):
                    self._act(action)
                self._say_what_it_wants(loop.time())
                if self._maybe_workers is not None:
                    self._maybe_workers.kill_hung(loop.time(), hang_seconds=self._agent.job.preset.launch.hang_seconds)
            return self._maybe_code
        finally:
            if self._maybe_workers is not None:
                self._maybe_workers.kill()
            for hand in (*self._hands.values(), *self._spares.values()):
                hand.end()
            looking.cancel()
            sampling.cancel()
            metrics.close()
            await self._links.close()

    async def _warm_up(self) -> None:
        """Nobody waits for a node that is not ready to start workers at once. Raises `InfrastructureError`."""
        while not self._agent.zygote.is_ready():
            self._agent.zygote.prepare()
            await asyncio.sleep(WARM_UP_LOOK_SECONDS)
        for local_rank, slots in enumerate(self._slots):
            self._hands[local_rank] = fork(self._agent.zygote.start, self._agent.job, local_rank, slots, may_stay=True)

    async def _next_event(self) -> Event:
        try:
            return await asyncio.wait_for(self._events.get(), self._timing.beat)
        except TimeoutError:
            return Tick()

    def _say_what_it_wants(self, now: float) -> None:
        """Once each time that it changes."""
        want = self._node.maybe_want(now)
        if want is not None and want != self._maybe_want:
            log.warning("node %d: %s", self._agent.node, want)
        self._maybe_want = want

    def _act(self, action: Action) -> None:
        match action:
            case Tell():
                self._links.tell(action.status)
            case Unlink():
                self._links.unlink(action.incarnation)
            case ReadRecord():
                self._ask_store(lambda record: record)
            case Propose():
                self._ask_store(lambda record: membership.begin_group(record, action.proposal))
            case Renew():
                self._ask_store(lambda record: membership.renew(record, action.token))
            case StartWorkers():
                self._start_workers(action.record)
            case StopWorkers():
                if self._maybe_workers is not None:  # or they ended just now
                    self._maybe_workers.stop()
            case AskWorkers():
                if self._maybe_workers is not None:
                    self._maybe_workers.ask(Order(do=action.to, seconds=self._agent.job.preset.launch.grace_seconds))
            case Leave():
                record = self._node.maybe_record
                is_over = record is not None and not action.is_preempted
                self._maybe_code = self._agent.exit_code(record) if record and is_over else EXIT_PREEMPTED

    # ---- the store -----------------------------------------------------------------------------------------------

    def _ask_store(self, change: Callable[[Record], Record]) -> None:
        """Replace the record by compare-and-set, in a thread, and tell the node what it is then."""
        task = asyncio.create_task(self._asked(change))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _asked(self, change: Callable[[Record], Record]) -> None:
        try:
            self._events.put_nowait(RecordSeen(maybe_record=await asyncio.to_thread(self._run.update, change)))
        except MissingError:
            log.info("the run was removed")
            self._maybe_code = 0
        except errors.UnbrokenError as error:  # the store is away, or closed to us: a healthy group trains on
            log.warning("%s", error)
            self._events.put_nowait(RecordSeen(maybe_record=None))

    async def _keep_looking(self, port: int, metrics_port: int) -> None:
        """Say where this agent is, and look for the others as long as some are missing."""
        own = Place(
            node=self._agent.node,
            incarnation=self._incarnation,
            address=self._agent.address,
            port=port,
            metrics_port=metrics_port,
        )
        is_known = False
        while True:
            try:
                if not is_known:
                    await asyncio.to_thread(self._publish, own)
                    is_known = True
                if len(self._node.peers) + 1 < self._node.num_nodes and self._node.phase != "training":
                    self._places = await asyncio.to_thread(self._find_places)
                    self._links.dial(self._places)
            except InfrastructureError as error:
                log.warning("%s", error)
            await asyncio.sleep(LOOK_SECONDS if self._node.maybe_record and self._node.maybe_record.token else 0.1)

    def _publish(self, place: Place) -> None:
        self._run.store.put(f"{self._prefix}nodes/{place.node}.json", canonical_json(asdict(place)))

    def _find_places(self) -> dict[int, Place]:
        keys = [key for key, _ in self._run.store.list_keys(f"{self._prefix}nodes/")]
        places = [parse(Place, read_document(self._run.store.get(key), what=key)) for key in keys]
        return {place.node: place for place in places}

    # ---- the workers ---------------------------------------------------------------------------------------------

    def _start_workers(self, record: Record) -> None:
        log.info("node %d: token %d, %d nodes", self._agent.node, record.token, record.num_nodes)
        self._maybe_workers = Workers(
            job=self._agent.job,
            node=self._agent.node,
            record=record,
            start=self._agent.zygote.start,
            slots=self._slots,
            on_end=self._workers_ended,
            may_stay=True,
            hands=self._hands,
            spares=self._spares,
        )
        self._num_groups += 1
        self._maybe_workers.begin(self._listener)

    def _workers_ended(self, outcome: Outcome) -> None:
        assert self._maybe_workers is not None
        log.info("node %d: out of the group of token %d", self._agent.node, self._maybe_workers.record.token)
        if outcome.maybe_departure is not None:
            self._departures[outcome.maybe_departure.class_name] += 1
        self._hands = self._maybe_workers.hands
        self._maybe_workers = None
        self._listener, before = self._bind(), self._listener  # in this order, or it might get the same port
        before.close()
        self._events.put_nowait(
            WorkersEnded(
                me=self._member(),
                step=outcome.step,
                is_finished=outcome.is_finished,
                maybe_departure=outcome.maybe_departure,
            )
        )

    def _metrics(self) -> str:
        now = asyncio.get_running_loop().time()
        ranks = self._maybe_workers.sights(now) if self._maybe_workers is not None else []
        moves = [now - rank.seconds_since_step for rank in ranks if rank.figures.get("steps")]
        self._moved_at = max(self._moved_at, *moves) if moves else self._moved_at
        return page_of(
            Situation(
                run_key=self._agent.job.key,
                num_goal_steps=self._agent.job.preset.train.steps,
                node=self._node,
                ranks=ranks,
                now=now,
                wall_time=time.time(),
                moved_at=self._moved_at,
                num_groups=self._num_groups,
                departures=self._departures,
            )
        )

    def _bind(self) -> socket.socket:
        """For the store of the next group: a port that no group before had."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((self._agent.address, 0))
        listener.listen(128)
        return listener

    def _member(self) -> Member:
        return Member(
            node=self._agent.node,
            incarnation=self._incarnation,
            address=self._agent.address,
            port=self._listener.getsockname()[1],
        )


def main() -> None:
    """`python -m training.cluster.agent NODE KEY JOB`; the store's location is in the environment."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)
    node, key, digest = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    die_with(os.getppid())
    location = location_from(os.environ)
    assert location is not None, "agents are started by the engine, which says where the store is"
    address = os.environ.get("UNBROKEN_NODE_ADDRESS", "127.0.0.1")
    try:
        job = read_job(Store(location), key, digest)
        code = Agent(job=job, node=node, address=address, zygote=Zygote(job.preset)).run()
    except errors.UnbrokenError as error:
        log.error("%s", error)
        time.sleep(RESTART_PAUSE_SECONDS)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
