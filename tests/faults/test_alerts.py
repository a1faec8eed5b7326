"""Alerts fired for real on four hosts, through Prometheus and Alertmanager to a webhook: once; over by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.monitoring.render import read_windows
from tasks.lifecycle.model_file import file_key
from tests.conftest import Stack
from tests.faults import alarms
from tests.faults.agents import submit
from tests.faults.alerting import ALERTMANAGER, PROMETHEUS, SERVERS, SHORT, site
from tests.faults.evidence import write_evidence
from tests.faults.hosts import Cluster
from tests.faults.trials import NUM_HOSTS, STACK_DISK_HOST, Alarm, Trial, mount_disks
from tests.serving.models import keep, promote
from tests.serving.servers import Server
from training.s3.objectstore import Store

pytestmark = pytest.mark.skipif(not (PROMETHEUS and ALERTMANAGER), reason="Prometheus and Alertmanager are needed")
STEPS = 20_000
DEADLINE_SECONDS = 3600
"""Between what all steps take at the usual pace, and without any pause."""
TIMING = {"silence_seconds": 5.0, "hang_seconds": 600.0, "join_seconds": 120.0}
"""Hangs are not healed, so that they are told of."""
CALM_SECONDS = 600.0
BUSY = "while True: pass"
FAULTS: dict[str, Callable[[Trial], Alarm]] = {
    **{f"{name} away": lambda tried, name=name: alarms.server_away(tried, name) for name in SERVERS},  # type: ignore[misc]
    "node's disk": alarms.node_disk_full,
    "stack's disk": alarms.stack_disk_full,
    "monitor away": alarms.monitor_away,
    "slow one": alarms.slow_node,
    "slow all": alarms.all_slow,
    "no checkpoints": alarms.no_checkpoints,
    "freeze all": lambda tried: alarms.frozen(tried, *range(NUM_HOSTS)),
    "freeze one": lambda tried: alarms.frozen(tried, 1),
    "kill": lambda tried: alarms.killed(tried, 1),
    "kill two": lambda tried: alarms.killed(tried, 0, 1),
    "nan": alarms.loss_not_finite,
    "repeated": alarms.node_fails_again_and_again,
}


@pytest.fixture(scope="module")
def cluster(stack: Stack) -> Iterator[Cluster]:
    with Cluster(NUM_HOSTS, store=stack.location.endpoint) as running:
        yield running


@contextmanager
def trial(
    stack: Stack,
    store: Store,
    cluster: Cluster,
    folder: Path,
    *,
    windows: dict[str, Any],
    timing: dict[str, Any] = TIMING,
    serving: str = "",
) -> Iterator[Trial]:
    (folder / "run").mkdir(parents=True)
    agents = submit(store, cluster, folder / "run", num_nodes=NUM_HOSTS, steps=STEPS, is_slow=True, **timing)
    disks = mount_disks(cluster, folder)
    more = {"home": disks[STACK_DISK_HOST], "serving": serving, **windows}
    with site(agents, cluster, stack.settings, folder / "site", **more) as watching:
        try:
            yield Trial(agents, cluster, watching, disks, folder)
        finally:
            for host in cluster.hosts:
                host.kill_all()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_standstill_a_killed_node_and_a_nan_are_told_of_once_each(
    stack: Stack, store: Store, cluster: Cluster, tmp_path: Path
) -> None:
    with trial(stack, store, cluster, tmp_path, windows=dict(SHORT)) as tried:
        tried.start_all()
        for alarm in (alarms.frozen(tried, *range(NUM_HOSTS)), alarms.killed(tried, 1), alarms.loss_not_finite(tried)):
            tried.try_out(replace(alarm, follows=()))  # these take their time


def regressed(store: Store) -> tuple[Callable[[], None], Alarm]:
    """What makes a model's good version champion; and that a damaged one becomes it."""
    from tests.serving.programs import program

    good, bad = (keep(store, "adder", version, program(float(version))) for version in ("1", "2"))

    def spoil() -> None:
        store.put(file_key("adder", bad.model_sha256), b"other bytes")
        promote(store, bad)

    def mend() -> None:
        promote(store, good)

    return mend, Alarm(
        fault="a damaged version becomes champion",
        alert="LiveModelRegressed",
        windows=("group_wait",),
        fire=spoil,
        heal=mend,
        says=("is refused, fails or has become slow", "version 1 of model adder", "unbroken models rollback"),
        is_of_run=False,
    )


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_fault_is_told_of_once(stack: Stack, store: Store, cluster: Cluster, tmp_path: Path) -> None:
    """FAULTS=kill,nan tries these alone, and writes nothing."""
    rows: list[dict[str, Any]] = []
    failures = []

    def attempt(tried: Trial, alarm: Alarm) -> None:
        try:
            rows.append(tried.try_out(alarm))
        except AssertionError as error:
            failures.append(f"{alarm.fault}: {error}")
        print(rows[-1:], failures, flush=True)

    begin, bad_model = regressed(store)
    begin()
    chosen = os.environ.get("FAULTS", "")
    with ExitStack() as opened:
        server = opened.enter_context(Server(stack, store, "adder@champion", replicas=1))
        tried = opened.enter_context(
            trial(stack, store, cluster, tmp_path / "all", windows=dict(SHORT), serving=server.url)
        )
        tried.start_all()
        for name in chosen.split(",") if chosen else FAULTS:
            attempt(tried, FAULTS[name](tried))
        attempt(tried, bad_model)
    deadline = {**TIMING, "deadline_seconds": DEADLINE_SECONDS}
    with trial(stack, store, cluster, tmp_path / "late", windows=dict(SHORT), timing=deadline) as tried:
        attempt(tried, alarms.too_slow_for_the_deadline(tried))
    shipped = read_windows()
    for row in rows:
        row["windows"] = {name: {"here": SHORT[name], "shipped": shipped[name]} for name in row["windows"]}
    assert failures == []
    if not chosen:
        write_evidence("alerts", rows=rows)


@contextmanager
def busy_processors() -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_nothing_is_told_of_an_undisturbed_run(stack: Stack, store: Store, cluster: Cluster, tmp_path: Path) -> None:
    """Ten minutes on processors that others use too, with the windows and timings that are shipped."""
    with trial(stack, store, cluster, tmp_path, windows={}, timing={}) as tried, busy_processors():
        tried.start_all()
        before, began, loads = tried.agents.run.read(), time.monotonic(), []
        while (seconds := time.monotonic() - began) < CALM_SECONDS:
            loads.append(os.getloadavg()[0])
            time.sleep(5)
        site, after = tried.site, tried.agents.run.read()
        row = {
            "seconds": round(seconds, 1),
            "steps": after.checkpoints[-1].step - before.checkpoints[-1].step,
            "groups": after.token - before.token + 1,
            "mean_load": round(sum(loads) / len(loads), 1),
            "processors": os.cpu_count(),
            "messages": [message.told() for message in site.messages],
            "fired": site.fired(seconds),
            "pending_longest": sorted(
                {each["metric"]["alertname"] for each in site.query(f"max_over_time(ALERTS[{round(seconds)}s])")}
            ),
        }
    print(row)
    assert (row["messages"], row["fired"]) == ([], [])
    write_evidence("no-alerts", rows=[row])
