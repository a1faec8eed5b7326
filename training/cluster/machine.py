"""What a node's machine is doing: processor, memory, disk, network, and NVIDIA's GPUs if their library is there."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from training.runs.exposition import Labels, Page

NVML = "libnvidia-ml.so.1"


def add_machine(page: Page, labels: Labels, maybe_nvml: Any = None) -> None:
    """As it is now; counters are the machine's own, since its boot."""
    times, memory, network = psutil.cpu_times(), psutil.virtual_memory(), psutil.net_io_counters()
    busy = sum(times[:8]) - times.idle - getattr(times, "iowait", 0.0)  # guests are in it already
    page.add("unbroken_node_cpu_seconds_total", busy, "Processor time that was used, of all processors", labels)
    page.add("unbroken_node_cpus", os.cpu_count() or 1, "Processors", labels)
    page.add("unbroken_node_memory_bytes", memory.total, "Memory", labels)
    page.add("unbroken_node_memory_available_bytes", memory.available, "Memory that a process could still get", labels)
    page.add("unbroken_node_network_received_bytes_total", network.bytes_recv, "Network traffic in", labels)
    page.add("unbroken_node_network_sent_bytes_total", network.bytes_sent, "Network traffic out", labels)
    paths = {device_of(path): path for path in (os.getcwd(), tempfile.gettempdir())}
    for device, path in paths.items():
        disk = psutil.disk_usage(path)
        there = {**labels, "path": path, "device": device}
        page.add("unbroken_node_disk_bytes", disk.total, "Size of the disk under a path that this node uses", there)
        page.add("unbroken_node_disk_free_bytes", disk.free, "What is free there", there)
    library = maybe_nvml or nvml()
    if library is not None:
        add_gpus(page, labels, library)


def device_of(path: str) -> str:
    """The disk under a path, by the same name for all processes of this machine, and by no other machine's."""
    return f"{_boot()}-{os.stat(path).st_dev:x}"


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@cache
def nvml() -> Any:
    """NVIDIA's management library, initialised; None where there is none."""
    with suppress(OSError):
        library = ctypes.CDLL(NVML)
        if library.nvmlInit_v2() == 0:
            return library
    return None


def add_gpus(page: Page, labels: Labels, library: Any) -> None:
    """What a GPU does not tell is left out."""
    for number, device in _devices(library):
        there = {**labels, "gpu": str(number)}
        use, memory = _Utilization(), _Memory()
        if library.nvmlDeviceGetUtilizationRates(device, ctypes.byref(use)) == 0:
            page.add("unbroken_node_gpu_busy_ratio", use.gpu / 100, "Share of the time that a kernel ran", there)
        if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0:
            page.add("unbroken_node_gpu_memory_bytes", memory.total, "Memory of the GPU", there)
            page.add("unbroken_node_gpu_memory_used_bytes", memory.used, "What of it is used", there)


def _devices(library: Any) -> Iterator[tuple[int, ctypes.c_void_p]]:
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return
    for number in range(count.value):
        device = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(device)) == 0:
            yield number, device
