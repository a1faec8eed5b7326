"""The node agent: joins the group, starts this node's workers, and begins again with whatever is left when one dies.

Placed by an engine, one per node. It imports no torch. Exit codes: 0 the run is finished (or somebody began it anew),
2 or 4 it failed for good, any other: start me again.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from training import errors, membership
from training.documents import parse
from training.errors import FencedError, InfrastructureError
from training.job import Job, read_job
from training.objectstore import Store, StoreLocation
from training.processes import die_with
from training.record import Departure, Member, Record, RunRecord
from training.worker import WorkerOrder, WorkerReport
from training.zygote import Worker, Zygote

JOIN_POLL_SECONDS = 0.2
WATCH_SECONDS = 0.1
RECORD_POLL_SECONDS = 2.0
SETTLE_SECONDS = 0.5
RESTART_PAUSE_SECONDS = 1.0  # the engine restarts at once: spare a store that is away
log = logging.getLogger("training.agent")


@dataclass(kw_only=True)
class Agent:
    """One node of one run."""

    job: Job
    node: int
    address: str
    zygote: Zygote = field(init=False)

    def __post_init__(self) -> None:
        self.zygote = Zygote(self.job.preset)

    def run(self) -> int:
        """Until the run is finished or has failed for good. Returns the exit code."""
        self.zygote.prepare()
        run = self.job.open_run()
        maybe_departure: Departure | None = None
        while True:
            with _bound_socket(self.address) as listener:
                me = Member(
                    node=self.node,
                    incarnation=uuid.uuid4().hex,
                    address=self.address,
                    port=listener.getsockname()[1],
                )
                record = self.form_group(run, me, maybe_departure)
                if self.is_over(record):
                    return self.exit_code(record)
                log.info("node %d: token %d, %d nodes", self.node, record.token, record.num_nodes)
                maybe_departure = self.work(run, record, listener)
            if maybe_departure is not None:
                self.maybe_give_up(run, maybe_departure)

    def form_group(self, run: RunRecord, me: Member, maybe_departure: Departure | None) -> Record:
        """Join, and wait until the group is complete; join again whenever it changed without me."""
        num_nodes = self.job.preset.launch.nodes

        def change(record: Record) -> Record:
            if self.is_over(record):
                return record
            return membership.join(record, me, num_nodes=num_nodes, maybe_departure=maybe_departure)

        while True:
            record = run.update(change)
            if me not in record.members or membership.is_complete(record):
                return record
            time.sleep(JOIN_POLL_SECONDS)

    def is_over(self, record: Record) -> bool:
        """Nothing is left to do for this job: not even a word about it belongs in the record."""
        return bool(record.result or record.failure or record.generation != self.job.generation)

    def exit_code(self, record: Record) -> int:
        """Always a final one: what is worth trying again, whoever follows the run starts again."""
        if record.generation != self.job.generation or record.failure is None:
            return 0
        log.error("the run failed: %s", record.failure.message)
        is_users = record.failure.kind == errors.UserError.__name__
        return errors.UserError.exit_code if is_users else errors.DeterministicError.exit_code

    def work(self, run: RunRecord, record: Record, listener: socket.socket) -> Departure | None:
        """Run this node's workers until they end. Returns why they failed; None if they finished or were fenced."""
        with tempfile.TemporaryDirectory(prefix="unbroken-") as folder:
            orders = self.orders(record, listener, Path(folder))
            workers = [self.zygote.start(asdict(order), _handed(order)) for order in orders]
            try:
                codes = self.watch(run, record, workers)
            finally:
                for worker in workers:
                    worker.kill()
                    worker.wait()
            return self.departure(record, orders, codes) if any(codes) else None

    def watch(self, run: RunRecord, record: Record, workers: Sequence[Worker]) -> list[int | None]:
        """The workers' exit codes as soon as one failed or all finished; none if another token took over."""
        next_look = time.monotonic() + RECORD_POLL_SECONDS
        while True:
            codes = [worker.poll() for worker in workers]
            if any(codes):
                return _settled(workers)
            if all(code == 0 for code in codes):
                return codes
            if time.monotonic() > next_look:
                with suppress(InfrastructureError):  # S3 being away never stops a healthy job
                    if run.read().token != record.token:
                        return []
                next_look = time.monotonic() + RECORD_POLL_SECONDS
            time.sleep(WATCH_SECONDS)

    def orders(self, record: Record, listener: socket.socket, folder: Path) -> list[WorkerOrder]:
        """What each of this node's workers is told. Ranks follow the order of nodes."""
        per_node = self.job.preset.launch.processes_per_node
        position = [member.node for member in record.members].index(self.node)
        first = record.members[0]
        return [
            WorkerOrder(
                job=self.job.to_json(),
                token=record.token,
                rank=position * per_node + local_rank,
                local_rank=local_rank,
                world_size=len(record.members) * per_node,
                store_address=first.address,
                store_port=first.port,
                maybe_listen_fd=listener.fileno() if position == local_rank == 0 else None,
                report_path=str(folder / f"report-{local_rank}.json"),
                agent_pid=os.getpid(),
            )
            for local_rank in range(per_node)
        ]

    def departure(self, record: Record, orders: Sequence[WorkerOrder], codes: Sequence[int | None]) -> Departure:
        """Why this node leaves the group: what failed by itself goes before what failed for the loss of a peer."""
        reports = [_report(order, code) for order, code in zip(orders, codes, strict=True) if code]
        report = min(reports, key=lambda report: (report.class_name == "PeerLost", report.class_name == "Exception"))
        log.warning("node %d left token %d: %s", self.node, record.token, report.message)
        return Departure(
            token=record.token, node=self.node, cause=report.message, step=report.step, class_name=report.class_name
        )

    def maybe_give_up(self, run: RunRecord, departure: Departure) -> None:
        """Note a failure for good in the record, if this is one."""

        def change(record: Record) -> Record:
            if self.is_over(record) or departure.class_name == FencedError.__name__:
                return record
            noted = (*record.departures, departure) if departure not in record.departures else record.departures
            record = replace(record, departures=noted)
            failure = membership.failure_to_report(record, departure, max_restarts=self.job.preset.launch.max_restarts)
            return replace(record, failure=failure)

        run.update(change)


def _bound_socket(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(128)
    return listener


def _handed(order: WorkerOrder) -> dict[str, int]:
    """The file descriptors of an order, by name."""
    return {} if order.maybe_listen_fd is None else {"maybe_listen_fd": order.maybe_listen_fd}


def _settled(workers: Sequence[Worker]) -> list[int | None]:
    """The exit codes a moment after the first failure: whoever only lost its peer may have been quicker to say so."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        time.sleep(WATCH_SECONDS)
    return [worker.poll() for worker in workers]


def _report(order: WorkerOrder, code: int) -> WorkerReport:
    """What a failed worker said, or what its exit code says."""
    path = Path(order.report_path)
    if path.exists():
        return parse(WorkerReport, json.loads(path.read_bytes()))
    message = f"worker killed by signal {-code}" if code < 0 else f"worker exited with {code}"
    return WorkerReport(class_name="Killed", message=message, step=0)


def main() -> None:
    """`python -m training.agent NODE KEY JOB`; the store's location is in the environment, as for the settings."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)
    node, key, digest = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    die_with(os.getppid())
    location = StoreLocation(
        endpoint=os.environ.get("UNBROKEN_S3_ENDPOINT") or None,
        bucket=os.environ["UNBROKEN_S3_BUCKET"],
        prefix=os.environ.get("UNBROKEN_S3_PREFIX", ""),
        region=os.environ.get("UNBROKEN_S3_REGION", "us-east-1"),
    )
    address = os.environ.get("UNBROKEN_NODE_ADDRESS", "127.0.0.1")
    try:
        job = read_job(Store(location), key, digest)
        code = Agent(job=job, node=node, address=address).run()
    except errors.UnbrokenError as error:
        log.error("%s", error)
        time.sleep(RESTART_PAUSE_SECONDS)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
