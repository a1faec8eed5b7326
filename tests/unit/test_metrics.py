"""What an agent serves at /metrics: the format, the port, and that every number is where it belongs."""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import socket
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from training.cluster.machine import add_gpus, add_machine, nvml
from training.cluster.metrics import Situation, page_of, usual_port
from training.cluster.node import Node
from training.cluster.protocol import Timing
from training.cluster.workers import RankSight
from training.control import Note
from training.documents import canonical_json
from training.runs.exposition import Page, serve
from training.runs.figures import Figures
from training.runs.record import Member, Record

ME = Member(node=1, incarnation="i", address="127.0.0.1", port=1)
RECORD = Record(key="k", token=4, members=(ME,), num_nodes=1)
KEY = "0123456789abcdef"


def numbers(text: str) -> dict[tuple[str, str], float]:
    """By name and rank (or path, class), as Prometheus's own parser reads them."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            more = {name: value for name, value in sample.labels.items() if name not in ("run", "node")}
            found[sample.name, ",".join(more.values())] = sample.value
    return found


def situation(*ranks: RankSight, **changes: Any) -> Situation:
    node = Node(
        me=ME, num_nodes=3, min_nodes=1, generation=0, max_restarts=9,
        timing=Timing(silence=3.0, join=1.0), since=0.0, phase="training", maybe_record=RECORD, maybe_group=RECORD,
    )  # fmt: skip
    usual = Situation(
        run_key=KEY, num_goal_steps=100, node=node, ranks=ranks, now=50.0, wall_time=1000.0, moved_at=40.0,
        num_groups=2, departures={"Hung": 3},
    )  # fmt: skip
    return replace(usual, **changes)


def test_each_rank_and_the_node_are_told_of() -> None:
    figures = Figures(steps=7, loss=0.5, outside_seconds=3.0, collective_seconds=1.0, checkpoint_step=5)
    figures.checkpoint_time = 990.0
    ranks = [
        RankSight(rank=2, step=9, silent_seconds=0.5, seconds_since_step=2.0, figures=figures.numbers()),
        RankSight(rank=3, step=9, silent_seconds=30.0, seconds_since_step=31.0, figures={}),
    ]
    found = numbers(page_of(situation(*ranks)))
    assert found["unbroken_rank_steps_total", "2"] == 7
    assert found["unbroken_rank_loss", "2"] == 0.5
    assert found["unbroken_rank_outside_seconds_total", "2"] == 3.0
    assert found["unbroken_rank_checkpoint_timestamp_seconds", "2"] == 990.0
    assert found["unbroken_rank_step_timestamp_seconds", "2"] == 998.0
    assert found["unbroken_rank_heard_timestamp_seconds", "3"] == 970.0
    assert ("unbroken_rank_steps_total", "3") not in found, "it has said nothing yet"
    assert found["unbroken_node_group_nodes", ""] == 1
    assert found["unbroken_node_wanted_nodes", ""] == 3
    assert found["unbroken_node_step_timestamp_seconds", ""] == 990.0
    assert found["unbroken_node_departures_total", "Hung"] == 3


def test_figures_travel_as_json_even_before_the_first_loss() -> None:
    numbers = Figures(loss=math.nan).numbers()
    assert "loss" not in numbers
    assert canonical_json(Note(event="beat", figures=numbers).figures)


def test_the_machine_is_told_of() -> None:
    page = Page()
    add_machine(page, {"node": "1"})
    found = numbers(page.text())
    used = found["unbroken_node_memory_bytes", ""] - found["unbroken_node_memory_available_bytes", ""]
    assert 0 < used < found["unbroken_node_memory_bytes", ""]
    disks = [path for name, path in found if name == "unbroken_node_disk_free_bytes"]
    assert len(disks) == len({os.stat(path).st_dev for path in (os.getcwd(), tempfile.gettempdir())}), "each once"
    assert found["unbroken_node_cpu_seconds_total", ""] > 0


class Library:
    """As NVIDIA's, with two devices, of which the second does not tell what it does."""

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number: int, device: Any) -> int:
        device._obj.value = number + 1
        return 0

    def nvmlDeviceGetUtilizationRates(self, device: ctypes.c_void_p, use: Any) -> int:
        use._obj.gpu = 25
        return 0 if device.value == 1 else 3

    def nvmlDeviceGetMemoryInfo(self, device: ctypes.c_void_p, memory: Any) -> int:
        memory._obj.total, memory._obj.used = 80, 20
        return 0


def test_gpus_are_told_of() -> None:
    page = Page()
    add_gpus(page, {}, Library())
    found = numbers(page.text())
    assert found["unbroken_node_gpu_busy_ratio", "0"] == 0.25
    assert ("unbroken_node_gpu_busy_ratio", "1") not in found
    assert found["unbroken_node_gpu_memory_used_bytes", "1"] == 20


def test_no_gpu_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.cluster.machine.NVML", "libnone.so.1")
    nvml.cache_clear()
    assert nvml() is None
    nvml.cache_clear()


def test_labels_are_escaped() -> None:
    page = Page()
    page.add("unbroken_x", 1, "x", {"path": 'a"b\\c\nd'})
    ((name, label),) = numbers(page.text())
    assert (name, label) == ("unbroken_x", 'a"b\\c\nd')


def test_metrics_are_served_on_the_usual_port_or_on_another() -> None:
    async def ask() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            server = await serve("127.0.0.1", taken.getsockname()[1], lambda: "unbroken_x{} 1\n")
            port = server.sockets[0].getsockname()[1]
            assert port != taken.getsockname()[1]
        get = urllib.request.urlopen
        reply = await asyncio.to_thread(get, f"http://127.0.0.1:{port}/metrics", timeout=120)
        assert reply.read() == b"unbroken_x{} 1\n"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            await asyncio.to_thread(get, f"http://127.0.0.1:{port}/", timeout=120)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()  # who hangs up is no trouble
        server.close()

    asyncio.run(ask())
    assert usual_port(KEY, 1) == usual_port(KEY, 1) != usual_port(KEY, 2)


def test_counting_a_step_costs_next_to_nothing() -> None:
    """It is told once a second by another thread: what the training thread does is a few additions."""
    figures, started = Figures(), time.thread_time()
    for _ in range(1000):
        figures.numbers()
    assert time.thread_time() - started < 1.0, "a millisecond each, of each second, would be 0.1 %"
