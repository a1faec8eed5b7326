"""Whoever can write the bucket can run nothing: each forged object is refused, and what it would do is not done."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.done import find_result
from tasks.lifecycle import champions, model_file
from tasks.lifecycle.champion import Change
from tasks.lifecycle.model_file import Signature, Tensor
from tasks.lifecycle.program_file import CONFIGS, EXAMPLE, GRAPH, harmless
from tasks.results import Dataset
from tasks.serving import published
from tasks.serving.program import load
from tasks.stored_results import loaded
from training.checkpoints.checkpoint import CheckpointRef, folder, load_checkpoint
from training.data.manifest import (
    FieldInfo,
    Manifest,
    describe_shard,
    load_manifest,
    load_shard,
    manifest_key,
    shard_key,
)
from training.documents import canonical_json, sealed, sha256_hex
from training.errors import DamagedError, UnbrokenError, UserError
from training.runs.identity import find_identity
from training.runs.job import read_job
from training.runs.record import RunRecord
from training.s3.objectstore import Store

ROOT = Path(__file__).parents[2]
IMAGE = Tensor(dtype="float32", shape=(-1, 3))
SIGNATURE = Signature(inputs=IMAGE, outputs=IMAGE)
DEEP = b"[" * 200_000
FORBIDDEN = (
    r"\bpickle\b(?!_)",
    r"(?<!safetensors\.)\btorch\.load\(",
    r"pyfunc\.load_model",
    r"(?<![\w.])eval\(",
    r"(?<![\w.])exec\(",
    r"yaml\.(unsafe_|full_)?load\(",
    r"shell=True",
    r"allow_pickle=True",
    r"weights_only=False",
    r"tarfile\.\w*\.extractall|\.extractall\(",
)


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(self)


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    """Proven to work, and gone again."""
    made = Canary(tmp_path / "canary")
    pickle.loads(made.pickled)
    made.path.unlink()
    return made


def test_no_source_line_runs_what_it_reads() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("training", "tasks", "infra", "flows")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(code_of(path), start=1)
        if any(re.search(pattern, line) for pattern in FORBIDDEN)
    ]
    assert found == []


def code_of(path: Path) -> list[str]:
    """Its lines, without comments and texts."""
    return re.sub(
        r'""".*?"""|#[^\n]*|"[^"\n]*"', lambda text: "\n" * text[0].count("\n"), path.read_text(), flags=re.S
    ).split("\n")


@pytest.fixture(scope="module")
def program() -> bytes:
    """A model of a free batch size, as registration writes one."""
    out = io.BytesIO()
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU()).eval()
    exported = torch.export.export(
        module, (torch.zeros(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    torch.export.save(exported, out)
    return out.getvalue()


def rewritten(program: bytes, **members: Any) -> bytes:
    """With other members; those that are no bytes become JSON."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(program)) as old, zipfile.ZipFile(out, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        held = {name.partition("/")[2]: old.read(name) for name in old.namelist()} | members
        for name, content in held.items():
            new.writestr(f"{root}/{name}", content if isinstance(content, bytes) else json.dumps(content))
    return out.getvalue()


def member(program: bytes, name: str) -> Any:
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        return json.loads(archive.read(f"{archive.namelist()[0].partition('/')[0]}/{name}"))


def serve(program: bytes) -> Any:
    return load(program, version="3", sha256=sha256_hex(program), signature=SIGNATURE)


def test_an_honest_program_gives_the_same_bits(program: bytes) -> None:
    rows = torch.rand(5, 3)
    expected = torch.export.load(io.BytesIO(program)).module()(rows)
    assert torch.equal(torch.from_numpy(serve(program).run(rows.numpy())), expected)


def test_pickles_in_a_model_file_are_not_run(program: bytes, canary: Canary) -> None:
    weights = member(program, "data/weights/model_weights_config.json")
    next(iter(weights["config"].values()))["use_pickle"] = True
    opaque = {
        "config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}
    }
    for forged in (
        rewritten(
            program, **{"data/weights/model_weights_config.json": weights, "data/weights/weight_0": canary.pickled}
        ),
        rewritten(
            program,
            **{"data/constants/model_constants_config.json": opaque, "data/constants/opaque_obj_0": canary.pickled},
        ),
        rewritten(program, **{"data/weights/model.pt": canary.pickled}),
        rewritten(program, **{"data/aotinductor/model/x.so": b"code"}),
    ):
        with pytest.raises(DamagedError, match="the model file"):
            serve(forged)
    serve(rewritten(program, **{EXAMPLE: canary.pickled}))  # the example is left out
    assert not canary.path.exists()


@pytest.mark.parametrize(
    "text", ["torch.os.system", "torch.ops.aten.from_file.default", "_operator.call", "#x:y", "math.comb"]
)
def test_operators_that_do_more_than_compute_are_refused(program: bytes, canary: Canary, text: str) -> None:
    graph = member(program, GRAPH)
    node = graph["graph_module"]["graph"]["nodes"][0]
    node["target"] = text
    node["inputs"] = [{"name": "command", "arg": {"as_string": f"touch {canary.path}"}, "kind": 1}]
    with pytest.raises(DamagedError, match=r"the operator"):
        serve(rewritten(program, **{GRAPH: graph}))
    assert not canary.path.exists()


@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('touch C')", "Symbol('a').__class__", "9**9**9**9", "Pow(9, Pow(9, 9))", "9999999!"],
)
def test_expressions_and_names_are_not_evaluated(program: bytes, canary: Canary, text: str) -> None:
    text = text.replace("C", str(canary.path))
    graph = member(program, GRAPH)
    graph["guards_code"] = [f"__import__('os').system('touch {canary.path}') or True"]
    serve(rewritten(program, **{GRAPH: graph}))  # guards are left out
    sizes = next(iter(graph["graph_module"]["graph"]["tensor_values"].values()))["sizes"]
    sizes[0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}
    with pytest.raises(DamagedError, match="the expression"):
        serve(rewritten(program, **{GRAPH: graph}))
    graph = member(program, GRAPH)
    graph["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = f"x={text}"
    with pytest.raises(DamagedError, match="the name"):
        serve(rewritten(program, **{GRAPH: graph}))
    assert not canary.path.exists()


def test_packed_members_are_refused(program: bytes) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data/weights/weight_0", bytes(1 << 20))
    for forged in (out.getvalue(), b"", program[:-40], b"PK"):
        with pytest.raises(DamagedError, match="the model file"):
            harmless(forged)
    assert CONFIGS


def test_a_forged_checkpoint_is_refused(store: Store, canary: Canary) -> None:
    """Forged with its digests, as only somebody can who writes the record too."""
    part = {"name": "part-0.safetensors", "sha256": sha256_hex(canary.pickled), "num_bytes": len(canary.pickled)}
    for name in (part["name"], "../../../other/part-0.safetensors"):
        manifest = canonical_json({"step": 1, "tensors": {}, "parts": [{**part, "name": name}]})
        reference = CheckpointRef(step=1, token=1, sha256=sha256_hex(manifest))
        base = folder("runs/k/0/", 1, 1)
        store.put(base + "manifest.json", manifest)
        store.put(base + str(part["name"]), canary.pickled)
        with pytest.raises((DamagedError, UserError), match=r"checkpoint 1 is damaged|no name of an object"):
            load_checkpoint(store, "runs/k/0/", reference)
    assert not canary.path.exists()


def test_a_forged_dataset_is_refused(store: Store, canary: Canary) -> None:
    """Its manifest has its own digest as name, as anybody can make it."""
    for name in (sha256_hex(canary.pickled), "../../../runs/k/record.json"):
        info = replace(describe_shard(canary.pickled, num_samples=1), sha256=name)
        forged = Manifest(fields={"x": FieldInfo(dtype="float32", shape=())}, splits={"train": (info,), "test": ()})
        store.put(manifest_key("d", forged.digest), forged.to_bytes())
        if ".." not in name:
            store.put(shard_key("d", name), canary.pickled)
        found = load_manifest(store, "d", forged.digest).splits["train"][0]
        with pytest.raises((DamagedError, UserError), match=r"damaged|is no name of an object"):
            load_shard(store, "d", found)
    assert not canary.path.exists()


def test_a_forged_result_of_a_stage_is_made_anew(store: Store, canary: Canary) -> None:
    call = {"__class__": "os.system", "command": f"touch {canary.path}"}
    for forged in (canary.pickled, sealed("result", call), sealed("result", {"name": call}), b"[" * 100_000):
        store.put("results/x.json", forged)
        assert find_result(store, "results/x.json", Dataset) is None
    assert not canary.path.exists()


def test_a_forged_champion_leads_to_no_other_object(store: Store) -> None:
    """Its version's name is a path to a document that the forger has put elsewhere."""
    change = Change(action="first", version="../../../runs/k/1", run_key="k", model_sha256="", by="a forger")
    champions.begin(store, "m", change)
    seen = published.find_champion(store, "m")
    with pytest.raises(UserError, match="is no name of an object"):
        published.of_champion(store, "m", seen)


@pytest.mark.parametrize(
    ("key", "ask"),
    [
        ("runs/k/record.json", lambda store: RunRecord(store, "k").read()),
        ("models/m/champion.json", lambda store: champions.read(store, "m")),
        ("models/m/versions/1.json", lambda store: model_file.find(store, "m", "1")),
        (manifest_key("d", sha256_hex(DEEP)), lambda store: load_manifest(store, "d", sha256_hex(DEEP))),
        (f"runs/k/jobs/{sha256_hex(DEEP)}.json", lambda store: read_job(store, "k", sha256_hex(DEEP))),
        ("runs/k/identity.json", lambda store: find_identity(store, "k")),
    ],
)
def test_documents_that_are_endlessly_deep_are_damaged(store: Store, key: str, ask: Callable[[Store], Any]) -> None:
    store.put(key, DEEP)
    with pytest.raises(DamagedError):
        ask(store)


def test_a_stored_task_result_is_a_document_or_refused(canary: Canary) -> None:
    from prefect._internal.result_records import ResultRecord

    from tasks import policy

    assert policy.stage_options(timeout_seconds=1)["result_serializer"] == "json"
    in_text = base64.encodebytes(canary.pickled).decode()
    call = {"__class__": "subprocess.getoutput", "data": {"cmd": f"touch {canary.path}"}}
    for serializer, result in (
        ({"type": "pickle"}, in_text),
        (None, in_text),
        ({"type": "compressed/pickle"}, in_text),
        ({"type": "json"}, json.dumps(call)),
        ({"type": "json"}, json.dumps({"__class__": "tests.unit.test_no_code_from_storage.Canary", "data": {}})),
        ({"type": "json", "object_decoder": "os.system", "jsonlib": "json"}, json.dumps(call)),
        ({"type": "json"}, "[" * 100_000),
    ):
        metadata = {"serializer": serializer} if serializer else {}
        stored = json.dumps({"metadata": metadata, "result": result}).encode()
        with pytest.raises(DamagedError, match="a stored result"):
            ResultRecord.deserialize(stored)
    assert not canary.path.exists()


def test_honest_results_come_back() -> None:
    from prefect.serializers import JSONSerializer

    from tasks import policy

    assert policy.PATIENCE_SECONDS
    dataset = Dataset(name="d", digest="0", num_train_samples=1, num_test_samples=2, num_shards=3, num_bytes=4)
    for value in (dataset, None, {"a": [1, "x"]}, [dataset]):
        assert JSONSerializer().loads(JSONSerializer().dumps(value)) == value
    error = JSONSerializer().loads(JSONSerializer().dumps(UserError("no such thing")))
    assert isinstance(error, UserError)
    assert str(error) == "no such thing"
    assert str(loaded(b'{"__exc_type__": "os.system", "message": "x"}')) == "os.system: x"


def test_an_error_that_a_record_names_is_one_of_ours() -> None:
    from training.errors import error_of

    assert isinstance(error_of("UserError", "no"), UserError)
    for name in ("Sequence", "__builtins__", "nothing"):
        assert type(error_of(name, "no")) is UnbrokenError


def test_no_source_line_listens_on_every_address() -> None:
    """Loopback, or the address of the node, is given to each socket by name."""
    found = [
        str(path.relative_to(ROOT))
        for folder in ("training", "tasks", "infra", "flows")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"0\.0\.0\.0|INADDR_ANY|\(\(\"\",", path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "name",
    [
        "flows.monitor.runs.Watched",
        "tasks.serving.link.Asked",
        "tasks.prediction.inputs.KeptVersion",
        "training.memory.slots.Memory",
    ],
)
def test_a_result_that_names_a_dataclass_which_is_no_document_is_refused(name: str) -> None:
    with pytest.raises(DamagedError):
        loaded(canonical_json({"__class__": name, "data": {}}))


@pytest.mark.parametrize("name", ["builtins.UnicodeDecodeError", "json.JSONDecodeError", f"{__name__}.OddError"])
def test_an_exception_that_cannot_be_made_of_its_message_is_told(name: str) -> None:
    assert repr(loaded(canonical_json({"__exc_type__": name, "message": "no"}))) == f"RuntimeError('{name}: no')"


class OddError(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message["key"])  # type: ignore[call-overload]
