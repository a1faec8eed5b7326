"""Names that lead elsewhere, files that unpack to more than a machine holds, hosts that are others' names."""

from __future__ import annotations

import asyncio
import gzip
import io
import socket
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from starlette.testclient import TestClient

from infra.hosts import allowed_hosts
from tasks.lifecycle.model_file import Tensor
from tasks.serving.app import App
from tasks.serving.frames import SIZES, Frame, packed
from tasks.serving.link import Link, ReplicaGoneError
from tasks.serving.metrics import Metrics
from tasks.serving.requests import BadRequestError, array_of
from tasks.serving.server import Wanted
from tests import secrets
from tests.secrets import places_of_secrets
from tests.waiting import wait_until
from training.data.exchange import _array_of, _read_tar
from training.data.source import records, tar
from training.data.source.places import SourceFile
from training.data.source.records import READERS
from training.documents import read_json
from training.errors import DamagedError, UserError
from training.runs.record import RunRecord
from training.s3.conditional import parse_versioned, with_nonce
from training.s3.objectstore import Store, StoreLocation

AWAY = Store(StoreLocation(endpoint="http://127.0.0.1:9", bucket="b", prefix="p/"))


def read(form: str, name: str, data: bytes) -> int:
    return sum(1 for _ in READERS[form](SourceFile(name=name, num_bytes=len(data), changed=""), io.BytesIO(data)))


@pytest.mark.parametrize("key", ["../x", "runs/../../x", "models/./x", "runs/..", "."])
def test_no_key_leads_elsewhere(key: str) -> None:
    for ask in (AWAY.get, AWAY.fetch, AWAY.exists, AWAY.delete, AWAY.read_versioned, lambda key: AWAY.put(key, b"")):
        with pytest.raises(UserError, match="is no name of an object"):
            ask(key)
    with pytest.raises(UserError, match="is no name of an object"):
        list(AWAY.list_entries(key))


def test_no_run_and_no_model_has_a_name_that_leads_elsewhere() -> None:
    with pytest.raises(UserError, match="is no name of an object"):
        RunRecord(AWAY, "../..").read()
    assert Wanted.parse("../x@champion").model == "../x"  # and the store refuses it
    with pytest.raises(UserError, match="is no name of an object"):
        AWAY.read_versioned("models/../x/champion.json")


def test_a_record_of_another_run_in_its_place_is_refused(store: Store) -> None:
    RunRecord(store, "one").create_if_missing()
    store.put("runs/other/record.json", store.get("runs/one/record.json"))
    with pytest.raises(DamagedError, match="of another run"):
        RunRecord(store, "other").read()


def test_what_changes_by_compare_and_set_proves_itself() -> None:
    data = with_nonce({"version": 3, "token": 7, "nonce": "of the one before"})[1]
    assert parse_versioned("it", data)["token"] == 7
    old = b'{"nonce":"0123456789abcdef0123456789abcdef","token":7,"version":3}'
    assert parse_versioned("it", old)["token"] == 7  # of an earlier release
    for damaged in (data.replace(b'"token":7', b'"token":8'), data.replace(b'"nonce"', b'"nance"'), b"{}"):
        with pytest.raises(DamagedError, match="it is not what was written there"):
            parse_versioned("it", damaged)
    with pytest.raises(DamagedError, match="version: it is no number"):
        parse_versioned("it", with_nonce({"version": "3"})[1])


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", '"\\ud800"', "9" * 5000, "", "{'a': 1}"])
def test_odd_json_is_refused(text: str) -> None:
    with pytest.raises(DamagedError, match=r"it is damaged: it is no JSON"):
        read_json(text, what="it")


def test_a_line_that_unpacks_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 20)
    bomb = gzip.compress(bytes(64 << 20))
    assert len(bomb) < 1 << 17
    with pytest.raises(UserError, match=r"x.jsonl.gz: line 1 is longer than 1048576 bytes"):
        read("jsonl", "x.jsonl.gz", bomb)
    assert read("jsonl", "x.jsonl.gz", gzip.compress(b"line\n" * 9)) == 9


def archive(mode: str, *members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as made:  # type: ignore[call-overload]  # a text is one of its literals
        for member, content in members:
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_a_member_that_unpacks_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_RECORD_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"member 'a\.bin' says that it has 2097152 bytes"):
        read("webdataset", "x.tar.gz", archive("w:gz", (tarfile.TarInfo("a.bin"), bytes(2 << 20))))


def test_a_header_that_unpacks_for_ever_is_refused() -> None:
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    with pytest.raises(UserError, match="a member's header says that it has 1099511627776 bytes"):
        read("webdataset", "x.tar", header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))


def test_a_member_with_holes_is_refused() -> None:
    member = tarfile.TarInfo("a.bin")
    member.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.size": "900",
    }
    member.size = 1
    with pytest.raises(UserError, match="holes"):
        read("webdataset", "x.tar", member.tobuf(tarfile.PAX_FORMAT) + b"x" + bytes(512 * 4 - 1))


def test_an_import_takes_no_member_with_holes(tmp_path: Path) -> None:
    """One that says it has a terabyte, in a file of two kilobytes."""
    member = tarfile.TarInfo("a.id")
    member.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.size": str(1 << 40),
    }
    member.size = 1
    path = tmp_path / "train-00000.tar"
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + b"x" + bytes(512 * 4 - 1))
    with pytest.raises(ValueError, match=r"'a\.id': it is no file, or one with holes"):
        _read_tar(path, {})


def test_members_of_any_name_are_only_ids() -> None:
    """Nothing is unpacked to a path."""
    assert read("webdataset", "x.tar", archive("w", (tarfile.TarInfo("../../etc/a.json"), b"{}"))) == 1


def test_an_array_is_as_long_as_it_says() -> None:
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    assert len(_array_of(out.getvalue())) == 3
    with pytest.raises(ValueError, match="its length is not what its header says"):
        _array_of(out.getvalue().replace(b"(3,), ", b"(99,),"))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"length|Object arrays"):
        _array_of(pickled.getvalue())


def test_texts_that_numpy_would_give_a_terabyte_are_refused() -> None:
    body = b'{"inputs": ["' + b"a" * 1_000_000 + b'"' + b',""' * 1_000_000 + b"]}"
    with pytest.raises(BadRequestError, match=r"inputs\[0\]: expected a number"):
        array_of(body, Tensor(dtype="float32", shape=(-1,)))


def test_on_loopback_only_its_own_names_are_answered() -> None:
    front = SimpleNamespace(num_ready=1)
    metrics = SimpleNamespace(requests=Counter())
    serving = App(front=cast(Any, front), metrics=cast(Any, metrics), follower=None)
    client = TestClient(serving.routes(allowed_hosts=allowed_hosts("127.0.0.1")))
    for host, status in (
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
    ):
        assert client.get("/ping", headers={"host": host}).status_code == status
    assert allowed_hosts("0.0.0.0") == ("*",)


@pytest.mark.parametrize("said", [b"\xff" * 40, packed(1, {})[:-2] + b"{[", SIZES.pack(1, 4, 0) + b"null"])
def test_a_server_process_that_says_what_is_no_frame_is_gone(said: bytes) -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        link = Link(cast(Any, None), reader, writer)
        asked = asyncio.create_task(link.ask({"do": "predict"}, patience_seconds=9.0))
        await asyncio.sleep(0)
        theirs.sendall(said)
        with pytest.raises(ReplicaGoneError):
            await asked
        theirs.close()

    asyncio.run(work())


def test_secrets_are_found_where_they_were_left(tmp_path: Path, store: Store) -> None:
    """What looks for them in every test session's stack (tests/conftest.py)."""
    (tmp_path / "server.log").write_bytes(b"x" * 5000 + b"key=hidden-word\n")
    (tmp_path / "credentials").write_text("hidden-word")
    store.put("runs/k/report.json", b'{"a": "hidden-word"}')
    found = places_of_secrets(tmp_path, store, ["hidden-word"], allowed=[tmp_path / "credentials"])
    assert found == [str(tmp_path / "server.log"), store.location.uri("runs/k/report.json")]


def test_no_report_is_too_old_to_be_looked_at(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "MAX_OBJECTS", 1)
    store.put("1/f/artifacts/report.html", b"<p>hidden-word")
    store.put("1/f/artifacts/other.html", b"<p>hidden-word")
    wait_until(lambda: _written_later(store), what="an object of a later second")
    assert places_of_secrets(tmp_path, store, ["hidden-word"]) == [store.location.uri("1/f/artifacts/report.html")]


def _written_later(store: Store) -> bool:
    store.put("newer", b"")
    times = {entry.key: entry.modified for entry in store.list_entries("")}
    return times["newer"] > max(time for key, time in times.items() if key != "newer")


@pytest.mark.parametrize(
    ("length", "status"), [("", 200), ("x", 200), ("-1", 200), ("\xb2", 200), ("9" * 5000, 413), ("99999999", 413)]
)
def test_a_request_of_an_odd_length_is_answered(length: str, status: int) -> None:
    """By its body, which is counted."""

    async def predict(body: bytes) -> Any:
        return SimpleNamespace(frame=Frame(1, {"status": 200, "rows": 1, "batch_rows": 1}, body), version="3")

    front = cast(Any, SimpleNamespace(num_waiting=0, num_waiting_bytes=0, predict=predict))
    client = TestClient(App(front=front, metrics=Metrics(), follower=None).routes(allowed_hosts=["*"]))
    headers = {"content-type": "application/json", "content-length": length.encode("latin-1")}
    assert client.post("/invocations", content=b"{}", headers=cast(Any, headers)).status_code == status
