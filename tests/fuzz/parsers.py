"""Every parser of what comes from storage or the network, with valid inputs of it, and what each may answer."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from tasks.bookmark import Bookmark
from tasks.evaluation.samples import Samples, from_parquet, to_parquet
from tasks.lifecycle import champion
from tasks.lifecycle.champion import Change
from tasks.lifecycle.model_file import KeptVersion, Signature, Tensor
from tasks.lifecycle.program_file import harmless
from tasks.serving.frames import packed, receive
from tasks.serving.requests import array_of
from tasks.stored_results import loaded
from training import tensorfile
from training.checkpoints.checkpoint import CheckpointManifest, PartInfo, Slice, TensorInfo
from training.cluster.links import BROKEN, Place, _Connection
from training.data.exchange import _array_of
from training.data.manifest import FieldInfo, Manifest, ShardInfo
from training.data.shard import Ragged, decode_shard, encode_shard
from training.data.source.places import SourceFile
from training.data.source.records import READERS
from training.documents import canonical_json, parse, read_document, sealed, unsealed
from training.errors import UnbrokenError
from training.runs.events import Event
from training.runs.events import _parse as parse_events
from training.runs.record import CheckpointRef, Member, Record
from training.runs.system import Sample
from training.s3.objectstore import _parse as parse_versioned
from training.s3.objectstore import _with_nonce
from training.s3.quickrequests import TruncatedError, _entries

IMPORT_ERRORS = (Exception,)
"""An import names its file, whatever that brings about."""
LISTING_ERRORS = (TruncatedError, SyntaxError, ValueError, KeyError)
"""Those of a page that is left to the S3 client (a `ParseError` is a `SyntaxError`)."""


@dataclass(frozen=True, kw_only=True)
class Parser:
    """`parse` raises `errors` for what it refuses. What `proves` itself is refused unless it means the same."""

    name: str
    seeds: tuple[bytes, ...]
    parse: Callable[[bytes], Any]
    proves: bool = False
    refuses: bool = True
    """Whether there is anything that it would not take."""
    errors: tuple[type[Exception], ...] = field(default=(UnbrokenError,))


def parsers() -> list[Parser]:
    record = {"format": 1, "version": 4, **asdict(RECORD)}
    return [
        Parser(name="a versioned document", seeds=(versioned(record),), parse=a_versioned, proves=True),
        Parser(name="a run record", seeds=(canonical_json(record),), parse=lambda data: document(Record, data)),
        Parser(name="a champion's history", seeds=CHAMPIONS, parse=lambda data: told(champion.from_json(a_dict(data)))),
        Parser(
            name="a model version",
            seeds=(canonical_json(asdict(KEPT)),),
            parse=lambda data: document(KeptVersion, data),
        ),
        Parser(name="a sealed bookmark", seeds=(BOOKMARK,), parse=a_bookmark, proves=True),
        Parser(name="events", seeds=(EVENTS,), parse=lambda data: parse_events(data, 3, uri="events")),
        Parser(name="samples of a machine", seeds=(SAMPLE,), parse=lambda data: document(Sample, data)),
        Parser(name="a dataset manifest", seeds=(MANIFEST.to_bytes(),), parse=Manifest.from_bytes),
        Parser(name="a shard", seeds=(SHARD,), parse=lambda data: len(decode_shard(data, name="s").columns)),
        Parser(
            name="a checkpoint manifest", seeds=(CHECKPOINT,), parse=lambda data: document(CheckpointManifest, data)
        ),
        Parser(
            name="a file of tensors",
            seeds=(TENSORS,),
            parse=lambda data: tensorfile.tensors(memoryview(bytearray(data))),
        ),
        Parser(name="an agent's place", seeds=(PLACE,), parse=lambda data: document(Place, data)),
        Parser(name="an agent's greeting", seeds=(GREETING,), parse=greeted, proves=True, errors=BROKEN),
        Parser(
            name="a listing of the store",
            seeds=(LISTING,),
            parse=lambda data: list(_entries(data)),
            errors=LISTING_ERRORS,
        ),
        Parser(name="a request for predictions", seeds=REQUESTS, parse=lambda data: array_of(data, INPUTS)),
        Parser(
            name="a frame",
            seeds=(packed(7, {"do": "predict"}, b"body"),),
            parse=lambda data: receive(io.BytesIO(data)),
        ),
        Parser(name="a stored task result", seeds=RESULTS, parse=loaded),
        Parser(name="a model file", seeds=(PROGRAM,), parse=lambda data: len(harmless(data))),
        Parser(name="scores", seeds=(SCORES,), parse=from_parquet),
        Parser(name="an array of an import", seeds=(ARRAY,), parse=_array_of, errors=IMPORT_ERRORS),
        *(
            Parser(name=f"records of {form}", seeds=SOURCES[form], parse=reader(form), refuses=form != "jsonl")
            for form in SOURCES
        ),
    ]


def a_dict(data: bytes) -> dict[str, Any]:
    return read_document(data, what="it")


def document(kind: type, data: bytes) -> Any:
    return parse(kind, a_dict(data))


def versioned(value: dict[str, Any]) -> bytes:
    return _with_nonce(value)[1]


def a_versioned(data: bytes) -> Any:
    """What it says beside its nonce."""
    return {name: value for name, value in parse_versioned("it", data).items() if name != "nonce"}


def told(document: champion.Champion) -> list[str]:
    return [entry.when for entry in document.entries]


def a_bookmark(data: bytes) -> Bookmark:
    return parse(Bookmark, unsealed("bookmark", data))


def greeted(data: bytes) -> str:
    """An agent that is told this by whoever connects, and does not know the secret."""

    async def greet() -> str:
        reader = asyncio.StreamReader(limit=1 << 20)
        reader.feed_data(data)
        reader.feed_eof()
        return await _Connection(reader, _Silent(), b"secret", is_caller=False).greet("me")  # type: ignore[arg-type]  # of a writer, what is used

    return asyncio.run(greet()) if b"\n" in data else "refused"


class _Silent:
    """A writer that nobody listens to."""

    transport: Any = property(lambda self: self)

    def write(self, data: bytes) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


def reader(form: str) -> Callable[[bytes], int]:
    suffix = {"packed lines": ("jsonl", "x.jsonl.gz")}.get(form, (form, "x"))

    def read(data: bytes) -> int:
        file = SourceFile(name=suffix[1], num_bytes=len(data), changed="")
        return sum(1 for _ in READERS[suffix[0]](file, io.BytesIO(data)))

    return read


def _archive(mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]  # a text is one of its literals
        for name in ("a.png", "a.json", "b" * 120 + ".json"):
            member = tarfile.TarInfo(name)
            member.size = 5
            archive.addfile(member, io.BytesIO(b"12345"))
    return out.getvalue()


def _table() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table({"a": [1, 2, 3], "b": ["x", "y", None], "c": [[1.0], [], [2.0]]}), out)
    return out.getvalue()


def _program() -> bytes:
    """As `torch.export.save` writes one, as far as it is looked at."""
    size = [{"as_int": 2}]
    payload = {
        "path_name": "weight_0",
        "is_param": True,
        "use_pickle": False,
        "tensor_meta": {"dtype": 7, "sizes": size},
    }
    node = {"target": "torch.ops.aten.relu.default", "inputs": [{"name": "self", "arg": {"as_tensor": {"name": "x"}}}]}
    node |= {"outputs": [{"as_tensor": {"name": "relu"}}], "metadata": {"stack_trace": 'File "a.py"'}}
    graph = {"graph_module": {"graph": {"inputs": [{"as_tensor": {"name": "x"}}], "nodes": [node]}}}
    graph |= {"torch_version": "2.13.0+cpu", "guards_code": ["L['x'].size()[0] >= 1"]}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("m/models/model.json", json.dumps(graph))
        archive.writestr("m/data/weights/model_weights_config.json", json.dumps({"config": {"0.w": payload}}))
        archive.writestr("m/data/constants/model_constants_config.json", '{"config": {}}')
        archive.writestr("m/data/weights/weight_0", bytes(8))
        archive.writestr("m/data/sample_inputs/model.pt", b"a pickle")
        archive.writestr("m/archive_version", b"0")
    return out.getvalue()


def _array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(6, dtype=np.float32).reshape(2, 3))
    return out.getvalue()


DIGEST = "0123456789abcdef" * 4
REFERENCE = CheckpointRef(step=20, token=3, sha256=DIGEST)
MEMBER = Member(node=0, incarnation="i", address="10.0.0.1", port=4711)
RECORD = Record(
    key=DIGEST, secret=DIGEST, token=3, members=(MEMBER,), resume_steps=(0, None, 10), checkpoints=(REFERENCE,)
)
CHANGE = Change(action="first", version="3", run_key=DIGEST, model_sha256=DIGEST, by="registration")
CHAMPIONS = (
    canonical_json(champion.to_json(champion.begun("digits", CHANGE, now=1_790_000_000.5))),
    canonical_json({"format": 1, "model": "digits", "version_of_registry": "3", "run_key": "k", "version": 1}),
)
INPUTS = Tensor(dtype="float32", shape=(-1, 3))
KEPT = KeptVersion(
    model="digits",
    version="3",
    run_key=DIGEST,
    weights_sha256=DIGEST,
    dataset_digest=DIGEST,
    model_sha256=DIGEST,
    num_bytes=9,
    signature=Signature(inputs=INPUTS, outputs=INPUTS),
)
EVENT = Event(kind="step", time=1.5, token=3, step=10, values={"loss": 0.5, "odd": "nan"})
EVENTS = EVENT.to_line() * 3
BOOKMARK = sealed("bookmark", asdict(Bookmark(instance="i", position=(3, 4), step=10, events=(EVENT,))))
SAMPLE = canonical_json(
    asdict(
        Sample(
            time=1.0,
            cpu_utilization_percentage=2.0,
            system_memory_usage_megabytes=3.0,
            system_memory_usage_percentage=4.0,
            network_receive_megabytes=5.0,
            network_transmit_megabytes=6.0,
        )
    )
)
SHARD_INFO = ShardInfo(sha256=DIGEST, xxh3=DIGEST[:32], num_samples=3, num_bytes=900)
MANIFEST = Manifest(
    fields={"image": FieldInfo(dtype="uint8", shape=(8, 8)), "text": FieldInfo(dtype="int32", shape=(None,))},
    splits={"train": (SHARD_INFO, SHARD_INFO), "test": (SHARD_INFO,)},
    classes=("cat", "dog"),
)
COLUMNS = {"label": np.arange(3), "text": Ragged.stack([np.arange(n, dtype=np.int32) for n in (1, 0, 2)])}
SHARD = encode_shard(["a#0", "b#0", "ü#0"], COLUMNS)
TENSORS = tensorfile.header([("w", "float32", (2, 3), 24), ("b", "bfloat16", (4,), 8)]) + bytes(32)
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
PLACE = canonical_json(asdict(Place(node=0, incarnation="i", address="10.0.0.1", port=4711)))
GREETING = b'{"incarnation": "b", "nonce": "n"}\n' + b"0" * 64 + b" {}\n"
LISTING = (
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false'
    b"</IsTruncated><EncodingType>url</EncodingType><Contents><Key>a%2Fb</Key><Size>9</Size><ETag>e</ETag>"
    b"<LastModified>2026-11-27T06:00:00Z</LastModified></Contents></ListBucketResult>"
)
REQUESTS = (b'{"inputs": [[1, 2.5, 3], [4, 5, 6]]}', b'{"instances": [[1, 2, 3]]}', b'{"inputs": [["a", 2, null]]}')
RESULTS = (
    canonical_json(
        {
            "__class__": "tasks.results.Dataset",
            "data": {
                "name": "d",
                "digest": DIGEST,
                "num_train_samples": 1,
                "num_test_samples": 2,
                "num_shards": 3,
                "num_bytes": 4,
            },
        }
    ),
    canonical_json({"__exc_type__": "training.errors.UserError", "message": "no"}),
)
PROGRAM = _program()
ARRAY = _array()
SCORES = to_parquet(Samples(ids=("a#0", "b#0"), scores={"loss": np.arange(2.0)}, metrics={"loss": "min"}, slices=()))
LINES = "jsonl"
SOURCES = {
    LINES: (b'{"a": 1}\n{"a": 2}\r\n\n{"a": 3}',),
    "packed lines": (gzip.compress(b'{"a": 1}\n' * 50, mtime=0),),
    "webdataset": (_archive("w"), _archive("w:gz"), _archive("w:xz")),
    "parquet": (_table(),),
}
