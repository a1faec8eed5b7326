"""The parsers of `training` but for those of data: run documents, checkpoints and events."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from safetensors.torch import save as save_tensors
from torch import zeros

from tests.fuzz.parser import DIGEST, Held, MemoryFile, Parser
from tests.unit.tiny import tiny_preset
from training import tensorfile
from training.checkpoints.checkpoint import (
    CheckpointManifest,
    PartInfo,
    Slice,
    TensorInfo,
    load_checkpoint,
    load_manifest,
)
from training.documents import canonical_json, digest_of, parse, read_document
from training.errors import DamagedError
from training.runs.events import Event, EventReader
from training.runs.goodput import account
from training.runs.identity import Identity, SourceFile, find_identity
from training.runs.job import Job, read_jobs
from training.runs.record import CheckpointRef, Departure, Failure, Member, Record, Result, RunRecord
from training.runs.system import Sample, SampleReader
from training.s3.conditional import parse_versioned, with_nonce
from training.s3.objectstore import StoreLocation

FILE = MemoryFile()
REFERENCE = CheckpointRef(step=20, token=3, sha256=DIGEST)
MEMBER = Member(node=0, incarnation="i", address="10.0.0.1", port=4711)
LEFT = Departure(token=1, node=1, cause="killed", step=4, class_name="Died", records=("a:1",))
RECORD = Record(
    key=DIGEST,
    secret=DIGEST,
    token=3,
    members=(MEMBER,),
    resume_steps=(0, None, 10),
    checkpoints=(REFERENCE,),
    departures=(LEFT,),
    failure=Failure(kind="UserError", message="no", records=("a:1",)),
    result=Result(step=20, weights_sha256=DIGEST, state_sha256=DIGEST, checkpoint=REFERENCE),
)
RECORD_DOCUMENT = {"format": 1, "version": 4, **asdict(RECORD)}
JOB = Job(
    key=DIGEST,
    generation=0,
    preset=replace(tiny_preset(), hyperparameters={"width": 3, "rates": [0.1, 0.2]}),
    dataset_digest=DIGEST,
    location=StoreLocation(endpoint="http://127.0.0.1:1", bucket="b"),
)
IDENTITY = Identity(
    determining={"recipe": "a:B", "preset": {"train": {"steps": 3}}, "recipe_source": DIGEST},
    sources={"a": SourceFile(path="/a.py", text="x = 'ü'\n"), "b": SourceFile(path="b", text="ü", encoding="latin-1")},
)
STEP_VALUES = {"loss": 0.5, "grad_norm": 0.25, "learning_rate": 0.1, "samples_per_second": 9.5, "seconds": 0.2}
EVENTS = tuple(
    Event(kind=kind, time=time, token=3, step=10, values=values)
    for kind, time, values in (
        ("attempt", 1.0, {"world_size": 2, "resumed_from": 0, "source": "memory"}),
        (
            "step",
            1.5,
            {**STEP_VALUES, "samples": DIGEST, "weights": DIGEST, "validation": {"accuracy": 0.5, "loss": "nan"}},
        ),
        ("checkpoint", 2.0, {"sha256": DIGEST}),
        ("pace", 2.5, {"outside_seconds": [0.1, 0.3], "straggler": {"rank": 1, "node": 1, "factor": 3.0}}),
        ("balance", 3.0, {"shares": [3, 5], "before": [4, 4], "worker_seconds": [0.1, 0.1]}),
    )
)
EVENT_LINES = b"".join(event.to_line() for event in EVENTS)
SAMPLE = Sample(
    time=1.0,
    cpu_utilization_percentage=2.0,
    system_memory_usage_megabytes=3.0,
    system_memory_usage_percentage=4.0,
    network_receive_megabytes=5.0,
    network_transmit_megabytes=6.0,
)
PART = save_tensors({"model.w": zeros(2, 3)})
CHECKPOINT = canonical_json(
    asdict(
        CheckpointManifest(
            step=20,
            tensors={
                "model.w": TensorInfo(
                    dtype="float32", shape=(2, 3), slices=(Slice(part=0, start=(0, 0), shape=(2, 3)),)
                )
            },
            parts=(PartInfo(name="part-0.safetensors", sha256=DIGEST, num_bytes=900),),
        )
    )
)
TENSORS = tensorfile.header([("w", "float32", (2, 3), 24), ("b", "bfloat16", (4,), 8)])


def parsers() -> list[Parser]:
    return [
        Parser(name="a versioned document", seeds=(versioned(RECORD_DOCUMENT),), parse=a_versioned, proves=True),
        Parser(name="a run record", seeds=(canonical_json(RECORD_DOCUMENT),), parse=a_record),
        Parser(name="a job", seeds=(canonical_json(JOB.to_json()),), parse=lambda data: jobs_of(data)),
        Parser(
            name="a run's identity", seeds=(canonical_json(asdict(IDENTITY)),), wrap=as_determined, parse=an_identity
        ),
        Parser(name="events", seeds=(EVENT_LINES,), parse=events),
        Parser(name="samples of a machine", seeds=(canonical_json(asdict(SAMPLE)),), parse=samples),
        Parser(name="a checkpoint manifest", seeds=(CHECKPOINT,), parse=a_checkpoint_manifest),
        Parser(name="a checkpoint's part", seeds=(PART,), parse=a_checkpoint),
        Parser(name="the head of a checkpoint's part", seeds=(head_of(PART),), wrap=part_of, parse=a_checkpoint),
        Parser(name="a file of tensors", seeds=(TENSORS + bytes(32),), parse=tensors),
        Parser(name="the head of a file of tensors", seeds=(head_of(TENSORS),), wrap=with_head, parse=tensors),
    ]


def a_dict(data: bytes) -> dict[str, Any]:
    return read_document(data, what="it")


def document(kind: type, data: bytes) -> Any:
    return parse(kind, a_dict(data))


def versioned(value: dict[str, Any]) -> bytes:
    return with_nonce(value)[1]


def a_versioned(data: bytes) -> Any:
    """What it says beside its nonce."""
    return {name: value for name, value in parse_versioned("it", data).items() if name != "nonce"}


def a_record(data: bytes) -> Any:
    found = RunRecord(Held({"record.json": data}), DIGEST).find()
    return found and canonical_json(asdict(found))


def jobs_of(data: bytes) -> Any:
    """As whoever trains it, and whoever tells of it, takes it."""
    return [
        (canonical_json(job.to_json()), job.preset.determining()) for job in read_jobs(Held({".json": data}), DIGEST)
    ]


def an_identity(data: bytes) -> Any:
    """Of the run key that the document would be of."""
    determining = a_dict(data).get("determining")
    found = find_identity(Held({"identity.json": data}), digest_of(determining))
    return found and {name: source.sha256 for name, source in found.sources.items()}


def as_determined(data: bytes) -> bytes:
    """An identity that names the sources which are there."""
    try:
        found = json.loads(data)
        modules = {name: parse(SourceFile, about).sha256 for name, about in found["sources"].items()}
        return canonical_json({**found, "determining": {**found["determining"], "recipe_source": digest_of(modules)}})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DamagedError):
        return data


def events(data: bytes) -> Any:
    """As those who tell of a run take them."""
    return told_by(EventReader(Held({"000000.jsonl": data}), "runs/", (3, 0)).read_next())


def told_by(found: list[Event]) -> Any:
    return account(found, (0, None, 10)).seconds


def samples(data: bytes) -> Any:
    return list(SampleReader(Held({"000000.jsonl": data}), "runs/").read_new())


def a_checkpoint_manifest(data: bytes) -> Any:
    return load_manifest(Held({"manifest.json": data}), "runs/k/0/", REFERENCE)


def a_checkpoint(data: bytes) -> Any:
    return {
        name: tensor.shape
        for name, tensor in load_checkpoint(
            Held({"manifest.json": CHECKPOINT, ".safetensors": data}), "runs/k/0/", REFERENCE
        ).items()
    }


def head_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def with_head(head: bytes) -> bytes:
    return len(head).to_bytes(8, "little") + head + bytes(32)


def part_of(head: bytes) -> bytes:
    return len(head).to_bytes(8, "little") + head + bytes(24)


def tensors(data: bytes) -> Any:
    return {name: tensor.shape for name, tensor in tensorfile.tensors(memoryview(bytearray(data))).items()}
