"""The parsers of `tasks`: models and champions, results of stages, scores, lineage, policies, serving."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from starlette.requests import Request

from tasks.attempts import attempt_tags, attempts_table, begun_by_token
from tasks.bookmark import Bookmark, find_bookmark
from tasks.done import find_result
from tasks.evaluation.samples import Samples, from_parquet, to_parquet
from tasks.follow import Progress, _after
from tasks.gate.decide import Decision, Reason
from tasks.gate.judge import Judgement
from tasks.gate.policy import NotWorse, Policy, load_policy
from tasks.lifecycle import alias, champion, champions, model_file
from tasks.lifecycle.champion import Change
from tasks.lifecycle.model_file import KeptVersion, Signature, Tensor
from tasks.lifecycle.policy import moved_by_hand
from tasks.lifecycle.program_file import harmless, understood
from tasks.lineage.gather import _gate
from tasks.prediction.kept import PredictedShard, Predictions
from tasks.provenance import Reproduced, Start, starts_of
from tasks.results import Dataset
from tasks.serving.app import App
from tasks.serving.frames import Frame, packed, read_frame, receive
from tasks.serving.metrics import Metrics
from tasks.serving.requests import array_of
from tasks.stored_results import loaded
from tasks.tracking import GENERATION_TAG, RUN_KEY_TAG, _metrics, open_run
from tests.fuzz.of_data import a_seal
from tests.fuzz.of_network import reader_of, run
from tests.fuzz.of_presets import TOML_WORDS
from tests.fuzz.of_training import EVENT_LINES, EVENTS, RECORD
from tests.fuzz.parser import DIGEST, Held, MemoryFile, Parser
from training.documents import canonical_json, digest_of, sealed
from training.errors import UnbrokenError
from training.runs.events import EventReader

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
BOOKMARK = asdict(Bookmark(instance="i", position=(3, 4), step=10, events=EVENTS))
DATASET = Dataset(name="d", digest=DIGEST, num_train_samples=1, num_test_samples=2, num_shards=3, num_bytes=4)
PREDICTED = PredictedShard(shard=DIGEST, num_samples=3, num_bytes=9, sha256=DIGEST)
PREDICTIONS = Predictions(
    model="m",
    version="3",
    run_key=DIGEST,
    model_sha256=DIGEST,
    dataset="d",
    dataset_digest=DIGEST,
    splits={"train": (PREDICTED,), "test": (PREDICTED,)},
)
START = Start(
    generation=0,
    by="me@here",
    commit="abc+changes",
    changes_sha256=DIGEST,
    flow_run="f",
    dvc=Reproduced(stage="s", revision="r", experiment="e"),
)
JUDGEMENT = Judgement(
    model="m",
    version="3",
    run_key=DIGEST,
    dataset_digest=DIGEST,
    scores_sha256=DIGEST,
    champion="2",
    champion_scores_sha256=DIGEST,
    policy=Policy(not_worse=(NotWorse(margin=0.1),)),
    decision=Decision(passed=True, reasons=(Reason(rule="not_worse", passed=True, text="it is not"),)),
)
REQUESTS = (b'{"inputs": [[1, 2.5, 3], [4, 5, 6]]}', b'{"instances": [[1, 2, 3]]}', b'{"inputs": [["a", 2, null]]}')
RESULTS = (
    canonical_json({"__class__": "tasks.results.Dataset", "data": asdict(DATASET)}),
    canonical_json({"__exc_type__": "training.errors.UserError", "message": "no"}),
)
RESULT_WORDS = (
    *(b"tasks.prediction.kept.Predictions", b"flows.monitor.runs.Watched", b"training.runs.record.Record"),
    *(b"tasks.serving.link.Asked", b"json.JSONDecodeError", b"builtins.UnicodeDecodeError", b"prefect.exceptions."),
    *(b"os.system", b"builtins.eval", b"training.errors.", b"tasks.lineage.verify.LineageError", b"tasks.__main__.x"),
    *(b"builtins.", b"asyncio.CancelledError", b"urllib.error.HTTPError", b"subprocess.CalledProcessError"),
)
POLICY = b"""[default]
confidence = 0.95
require_ledger = false
[[default.not_worse]]
margin_percent = 2.0
[[models.digits.threshold]]
metric = "accuracy"
at_least = 0.95
slices = ["label"]
[[models.digits.better]]
metric = "loss"
"""
SCORES = to_parquet(Samples(ids=("a#0", "b#0"), scores={"loss": np.arange(2.0)}, metrics={"loss": "min"}, slices=()))
HTTP = b"content-type: application/json\r\ncontent-length: 36\r\n\r\n" + REQUESTS[0]
HTTP_WORDS = (
    *(
        b"content-length: 99999999\r\n",
        b"content-length: -1\r\n",
        b"content-length: \xb2\r\n",
        b"content-length: a\r\n",
    ),
    *(
        b"content-length: 1_0\r\n",
        b"application/json; charset=x",
        b"text/csv",
        b"\r\n",
        b"content-length: " + b"9" * 5000,
    ),
)
TAGS = json.dumps(
    {RUN_KEY_TAG: DIGEST, GENERATION_TAG: "3", alias.SHOWN_TAG: "4", "unbroken.store": "s3://b/"}
).encode()
FILE = MemoryFile()


NODE = {
    "target": "torch.ops.aten.relu.default",
    "inputs": [{"name": "self", "arg": {"as_tensor": {"name": "x"}}}, {"name": "s", "arg": {"as_string": "a b"}}],
    "outputs": [{"as_tensor": {"name": "relu"}}, {"as_sym_int": {"as_expr": {"expr_str": "2*s0"}}}],
    "metadata": {"stack_trace": 'File "a.py"'},
}
GRAPH = json.dumps(
    {
        "graph_module": {
            "graph": {"inputs": [{"as_tensor": {"name": "x"}}], "nodes": [NODE]},
            "in_spec": '{"type": null}',
        },
        "torch_version": "2.13.0+cpu",
        "guards_code": ["L['x'].size()[0] >= 1"],
    }
).encode()
META = {"dtype": 7, "sizes": [{"as_int": 2}]}
WEIGHTS = json.dumps(
    {"config": {"0.w": {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": META}}}
).encode()
MEMBERS = {
    "models/model.json": GRAPH,
    "data/weights/model_weights_config.json": WEIGHTS,
    "data/constants/model_constants_config.json": b'{"config": {}}',
    "data/weights/weight_0": bytes(8),
    "data/sample_inputs/model.pt": b"a pickle",
    "archive_version": b"0",
}


def program() -> bytes:
    """As `torch.export.save` writes one, as far as it is looked at."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(f"m/{name}", content)
    return out.getvalue()


PROGRAM_WORDS = (
    *(b"torch.os.system", b"torch.ops.aten.save", b'"as_operator"', b'"expr_str"', b"__import__('os')", b"**"),
    *(b'[1, 2, {\\"type\\": \\"os\\"}]', b'"use_pickle": true', b"Pow(s0, Integer(3))", b"9" * 30),
)


def parsers() -> list[Parser]:
    return [
        Parser(name="a champion's history", seeds=CHAMPIONS, parse=a_champion),
        Parser(name="a model version", seeds=(kept_document(canonical_json(asdict(KEPT))),), parse=a_kept_version),
        Parser(name="what is kept of a model version", seeds=(canonical_json(asdict(KEPT)),), wrap=kept_document,
               parse=a_kept_version),
        Parser(name="a sealed bookmark", seeds=(sealed("bookmark", BOOKMARK),), parse=a_bookmark, refuses=False),
        Parser(name="a bookmark", seeds=(canonical_json(BOOKMARK),), wrap=a_seal("bookmark"), parse=a_bookmark,
               refuses=False),
        Parser(name="events, as they are followed", seeds=(EVENT_LINES,), parse=followed),
        Parser(name="a stage's result", seeds=(canonical_json(asdict(DATASET)),), wrap=a_seal("result"), parse=a_result,
               refuses=False),
        Parser(name="predictions", seeds=(canonical_json(asdict(PREDICTIONS)),), wrap=a_seal("result"),
               parse=predictions, refuses=False),
        Parser(name="a start of a run", seeds=(canonical_json(asdict(START)),), parse=a_start),
        Parser(name="a decision of the gate", seeds=(JUDGEMENT.to_bytes(),), parse=a_decision, refuses=False),
        Parser(name="scores", seeds=(SCORES,), parse=from_parquet),
        Parser(name="a stored task result", seeds=RESULTS, parse=loaded, words=RESULT_WORDS),
        Parser(name="a model file", seeds=(program(),), parse=a_program),
        Parser(name="the graph of a model file", seeds=(GRAPH,), parse=a_graph, words=PROGRAM_WORDS),
        Parser(name="the weights of a model file", seeds=(WEIGHTS,), parse=weights, words=PROGRAM_WORDS),
        Parser(name="tags in MLflow", seeds=(TAGS,), wrap=texts, parse=tags, refuses=False),
        Parser(name="a gate's policy", seeds=(POLICY,), parse=a_policy, words=TOML_WORDS),
        Parser(name="a registry's policy", seeds=(b'[champion]\nmoved_by_hand = "adopt" # b\n',), parse=by_hand,
               words=(*TOML_WORDS, b"champion", b"adopt", b"revert")),
        Parser(name="a request for predictions", seeds=REQUESTS, parse=lambda data: array_of(data, INPUTS).tobytes()),
        Parser(name="an HTTP request for predictions", seeds=(HTTP,), parse=invoked, words=HTTP_WORDS, refuses=False),
        Parser(name="a frame", seeds=(packed(7, {"do": "predict"}, b"body"),), parse=a_frame),
    ]  # fmt: skip


def a_champion(data: bytes) -> Any:
    found = champions.find(Held({"champion.json": data}), "digits")
    assert found is not None
    return [entry.when for entry in found.entries], champion.to_json(found)


def kept_document(data: bytes) -> bytes:
    """Around what is kept, with its digest."""
    try:
        kept = json.loads(data)
        return canonical_json({"format": 1, "kept": kept, "sha256": digest_of(kept)})
    except (ValueError, RecursionError):
        return data


def a_kept_version(data: bytes) -> Any:
    return model_file.find(Held({".json": data}), "digits", "3").identity


def a_bookmark(data: bytes) -> Any:
    """And what a follower makes of its events."""
    found = find_bookmark(Held({".json": data}), RECORD, told_step=1e9)
    assert canonical_json(asdict(found))
    return told(list(found.events))


def followed(data: bytes) -> Any:
    return told(EventReader(Held({"000000.jsonl": data}), "runs/", (3, 0)).read_next())


def told(events: Any) -> Any:
    """To a terminal, and to MLflow."""
    progress = Progress(num_steps=20)
    for event in events:
        progress = _after(progress, event)
    lines = progress.line()
    points = [_metrics(event) for event in events if event.kind == "step"]
    return lines, points, attempts_table(RECORD, begun_by_token(events)), attempt_tags(RECORD)


def a_result(data: bytes) -> Any:
    return find_result(Held({"key": data}), "key", Dataset)


def predictions(data: bytes) -> Any:
    found = find_result(Held({"key": data}), "key", Predictions)
    return found and found.num_samples


def a_start(data: bytes) -> Any:
    return starts_of(Held({".json": data}), DIGEST)


def a_decision(data: bytes) -> Any:
    """As `models why` tells of it; what is damaged is told, too."""
    unknown: list[str] = []
    tags = {"unbroken.gate.decision": DIGEST}
    found = _gate(Held({".json": data}), "m", (), tags, unknown)
    assert (found is None) == bool(unknown)
    return found and canonical_json(asdict(found))


def a_program(data: bytes) -> int:
    return len(harmless(data))


def a_graph(data: bytes) -> Any:
    return len(understood({**MEMBERS, "models/model.json": data})["models/model.json"])


def weights(data: bytes) -> Any:
    return len(understood({**MEMBERS, "data/weights/model_weights_config.json": data}))


def texts(data: bytes) -> bytes:
    """Tags are texts."""
    try:
        found = json.loads(data)
        return json.dumps({str(name): str(value) for name, value in found.items()}).encode()
    except (ValueError, RecursionError, AttributeError):
        return b"{}"


def tags(data: bytes) -> Any:
    found = json.loads(data)
    return alias.shown_change(found), open_run("r", found)


def a_policy(data: bytes) -> Any:
    return canonical_json(asdict(load_policy(FILE.holding(data), "digits")))


def by_hand(data: bytes) -> Any:
    return moved_by_hand(FILE.holding(data))


class FrontOfNone:
    """It answers at once."""

    num_waiting = num_waiting_bytes = 0

    async def predict(self, body: bytes) -> Any:
        return SimpleNamespace(frame=Frame(1, {"status": 200, "rows": 1, "batch_rows": 1}, b"{}"), version="3")


APP = App(front=cast(Any, FrontOfNone()), metrics=Metrics(), follower=None)


def invoked(data: bytes) -> int:
    """A head and a body, as the server in front gives them."""
    head, _, body = data.partition(b"\r\n\r\n")
    pairs = [line.partition(b":")[::2] for line in head.split(b"\r\n")]
    scope = {"type": "http", "method": "POST", "headers": [(name.lower(), value.strip()) for name, value in pairs]}

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    return int(run(APP.invocations(Request(scope, receive))).status_code)


def a_frame(data: bytes) -> Any:
    """By a replica and by the front."""
    found = receive(io.BytesIO(data))
    if found is None:
        raise UnbrokenError("it ends")
    assert run(read_frame(reader_of(data))) == found
    return found
