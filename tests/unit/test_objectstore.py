"""The store on a real S3 server: conditional writes that know their own, and errors that say who must act."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Barrier, Thread
from typing import Any

import pytest
from urllib3 import BaseHTTPResponse

from tests.faults.proxy import LosingProxy
from tests.unit.fake_s3 import FakeS3
from training.documents import sha256_hex
from training.errors import DamagedError, InfrastructureError, MissingError, UserError
from training.s3 import objectstore
from training.s3.objectstore import Store

NUM_RACERS = 8


def race(keys: Sequence[str], attempt: Callable[[str, int], bool]) -> dict[str, list[bool]]:
    """Which of the racers won, for each key; all of them start together."""
    starters = [(key, number) for key in keys for number in range(NUM_RACERS)]
    barrier = Barrier(len(starters))

    def run(starter: tuple[str, int]) -> bool:
        barrier.wait(timeout=120)
        return attempt(*starter)

    with ThreadPoolExecutor(len(starters)) as pool:
        won = list(pool.map(run, starters))
    return {key: won[at * NUM_RACERS : (at + 1) * NUM_RACERS] for at, key in enumerate(keys)}


# ---- plain objects ---------------------------------------------------------------------------------------------------


def test_put_get_list_delete(store: Store) -> None:
    for key in ("b", "a/2", "a/10", "ab"):
        store.put(key, key.encode())
    assert store.get("a/10") == b"a/10"
    assert list(store.list_keys("a/")) == [("a/10", 4), ("a/2", 3)]
    assert [key for key, _ in store.list_keys("")] == ["a/10", "a/2", "ab", "b"]
    assert store.list_folders("") == ["a"]
    assert list(store.list_keys("zz")) == []
    store.delete("b")
    assert not store.exists("b")
    store.delete("b")


def test_existence_is_of_exactly_this_key(store: Store) -> None:
    store.put("model-10", b"x")
    assert not store.exists("model-1")
    assert store.exists("model-10")


def test_a_missing_object_is_named(store: Store) -> None:
    with pytest.raises(MissingError, match=f"{store.location.prefix}none".replace("[", r"\[")):
        store.get("none")
    with pytest.raises(MissingError, match="none"):
        store.read_versioned("none")


def test_get_proven_refuses_other_bytes_by_name(store: Store) -> None:
    store.put("x", b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert store.get_proven("x", sha256=digest) == b"abc"
    store.put("x", b"abd")
    with pytest.raises(DamagedError, match="/x is damaged"):
        store.get_proven("x", sha256=digest)


def test_what_is_sent_arrives_whole_or_not_at_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.send("quick/ü ~x", b"a", memoryview(b"bc"), b"", sha256=sha256_hex(b"abc"))
    assert store.get("quick/ü ~x") == b"abc"
    statuses: list[int] = []
    request = store._connections.request

    def damaging(method: str, url: str, *, body: Sequence[bytes] = (), **options: Any) -> BaseHTTPResponse:
        """Flips a bit of every body on its way."""
        reply = request(method, url, body=[bytes(byte ^ 1 for byte in piece) for piece in body], **options)
        statuses.append(reply.status)
        return reply

    monkeypatch.setattr(store._connections, "request", damaging)
    store.send("fallback", b"ab", b"c", sha256=sha256_hex(b"abc"))
    assert statuses == [400], "the store looks"
    assert store.get("fallback") == b"abc", "what is refused there goes the patient way"
    with pytest.raises(DamagedError, match="fallback was read back with other bytes"):
        store.put_proven("fallback", b"abc", sha256=sha256_hex(b"abc"))


def test_an_object_holds_exactly_its_bytes(store: Store) -> None:
    data = bytearray(range(256)) * 1200
    assert len(data) > objectstore.PIECE_BYTES
    store.put("x", data)
    assert store.holds("x", data)
    for other in (data[:-1], data + b"x", data[:-1] + b"x", b"x" + data[1:], b""):
        assert not store.holds("x", other)
    with pytest.raises(MissingError, match="none"):
        store.holds("none", data)


def test_put_immutable_sends_once_and_repairs_damage(store: Store) -> None:
    assert store.put_immutable("x", b"abc")
    assert not store.put_immutable("x", b"abc")
    store.put("x", b"damaged")
    assert store.put_immutable("x", b"abc")
    assert store.get("x") == b"abc"


# ---- conditional writes ----------------------------------------------------------------------------------------------


def test_create_only_once(store: Store) -> None:
    assert store.create_versioned("r", {"writer": 1})
    assert not store.create_versioned("r", {"writer": 2})
    document = store.read_versioned("r").document
    assert (document["writer"], document["version"]) == (1, 1)


def test_a_stale_read_cannot_replace(store: Store) -> None:
    store.create_versioned("r", {"writer": 0})
    read = store.read_versioned("r")
    assert store.replace_versioned("r", {"writer": 1}, read=read)
    assert not store.replace_versioned("r", {"writer": 2}, read=read)
    document = store.read_versioned("r").document
    assert (document["writer"], document["version"]) == (1, 2)


def test_contents_a_b_a_do_not_let_a_stale_writer_in(store: Store) -> None:
    store.create_versioned("r", {"state": "A"})
    stale = store.read_versioned("r")
    for state in ("B", "A"):
        assert store.replace_versioned("r", {"state": state}, read=store.read_versioned("r"))
    assert store.read_versioned("r").document["state"] == stale.document["state"]
    assert not store.replace_versioned("r", {"state": "stale"}, read=stale)
    assert store.read_versioned("r").document["state"] == "A"


def test_the_same_document_written_twice_has_another_etag(store: Store) -> None:
    store.create_versioned("r", {"state": "A"})
    etags = {store.read_versioned("r").etag}
    for _ in range(3):
        store.replace_versioned("r", {"state": "A"}, read=store.read_versioned("r"))
        etags.add(store.read_versioned("r").etag)
    assert len(etags) == 4


def test_one_of_eight_racers_wins_each_time(store: Store) -> None:
    keys = ("r0", "r1", "r2")
    created = race(keys, lambda key, number: store.create_versioned(key, {"writer": number}))
    reads = {key: store.read_versioned(key) for key in keys}
    for key in keys:
        assert created[key].count(True) == 1
        assert reads[key].document["writer"] == created[key].index(True)

    replaced = race(keys, lambda key, number: store.replace_versioned(key, {"writer": number}, read=reads[key]))
    for key in keys:
        assert replaced[key].count(True) == 1
        document = store.read_versioned(key).document
        assert (document["writer"], document["version"]) == (replaced[key].index(True), 2)


@pytest.mark.usefixtures("quick_retries")
def test_a_lost_reply_to_a_create_is_still_this_writers_success(behind_proxy: Store, proxy: LosingProxy) -> None:
    proxy.lose_replies("PUT")
    assert behind_proxy.create_versioned("r", {"writer": 1})
    assert proxy.num_lost == 1
    document = behind_proxy.read_versioned("r").document
    assert (document["writer"], document["version"]) == (1, 1)
    assert not behind_proxy.create_versioned("r", {"writer": 2})


@pytest.mark.usefixtures("quick_retries")
def test_a_lost_reply_to_a_replace_is_written_exactly_once(behind_proxy: Store, proxy: LosingProxy) -> None:
    behind_proxy.create_versioned("r", {"count": 0})
    read = behind_proxy.read_versioned("r")
    proxy.lose_replies("PUT")
    assert behind_proxy.replace_versioned("r", {"count": 1}, read=read)
    assert proxy.num_lost == 1
    document = behind_proxy.read_versioned("r").document
    assert (document["count"], document["version"]) == (1, 2)


@pytest.mark.usefixtures("quick_retries")
def test_a_lost_reply_to_a_refusal_is_still_a_refusal(behind_proxy: Store, proxy: LosingProxy) -> None:
    behind_proxy.create_versioned("r", {"writer": 0})
    stale = behind_proxy.read_versioned("r")
    behind_proxy.replace_versioned("r", {"writer": 1}, read=stale)
    proxy.lose_replies("PUT")
    assert not behind_proxy.replace_versioned("r", {"writer": 2}, read=stale)
    assert proxy.num_lost == 1
    assert behind_proxy.read_versioned("r").document["writer"] == 1


@pytest.mark.usefixtures("quick_retries")
def test_quick_reads_ride_out_lost_replies(behind_proxy: Store, proxy: LosingProxy) -> None:
    behind_proxy.put("a", b"something")
    proxy.lose_replies("GET", 2)
    assert bytes(behind_proxy.fetch("a")) == b"something"
    assert proxy.num_lost == 2
    proxy.lose_replies("GET", 2)
    assert behind_proxy.holds("a", b"something")
    assert proxy.num_lost == 4


@pytest.mark.usefixtures("quick_retries")
def test_to_ask_whether_an_object_is_there_rides_out_lost_replies(behind_proxy: Store, proxy: LosingProxy) -> None:
    behind_proxy.put("a", b"something")
    proxy.lose_replies("HEAD", 2)
    assert behind_proxy.exists("a")
    assert not behind_proxy.exists("b")
    assert proxy.num_lost == 2


def test_quick_reads_name_what_is_wrong_as_the_others_do(store: Store, quick_retries: None) -> None:
    with pytest.raises(MissingError, match="nothing/here does not exist"):
        store.fetch("nothing/here")
    elsewhere = Store(replace(store.location, bucket="no-such-bucket"))
    with pytest.raises(UserError, match="no-such-bucket"):
        elsewhere.fetch("key")
    away = Store(replace(store.location, endpoint="http://127.0.0.1:9"))
    with pytest.raises(InfrastructureError, match=r"127\.0\.0\.1:9"):
        away.fetch("key")


def test_plain_reads_and_writes_ride_out_lost_replies(behind_proxy: Store, proxy: LosingProxy) -> None:
    proxy.lose_replies("PUT", 2)
    behind_proxy.put("x", b"abc")
    proxy.lose_replies("GET", 2)
    assert behind_proxy.get("x") == b"abc"
    assert proxy.num_lost == 4


@pytest.mark.usefixtures("quick_retries")
def test_a_document_that_is_no_json_is_damage_with_a_name(store: Store) -> None:
    store.put("r", b"[1, 2]")
    with pytest.raises(DamagedError, match="/r is damaged"):
        store.read_versioned("r")


# ---- errors by who must act ------------------------------------------------------------------------------------------


def operations(store: Store) -> dict[str, Callable[[], object]]:
    return {
        "get": lambda: store.get("x"),
        "put": lambda: store.put("x", b""),
        "list": lambda: list(store.list_keys("")),
        "read_versioned": lambda: store.read_versioned("x"),
        "create_versioned": lambda: store.create_versioned("x", {}),
        "delete": lambda: store.delete("x"),
    }


def test_wrong_credentials_are_the_users_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    for operation in operations(Store(store.location)).values():
        with pytest.raises(UserError, match=r"no permission for s3://.*check the credentials") as caught:
            operation()
        assert "hush-hush" not in str(caught.value)


def test_a_missing_bucket_is_the_users_error() -> None:
    """SeaweedFS makes a missing bucket at the first PUT of an administrator, so the server here is the fake one."""
    with FakeS3(has_bucket=False) as server:
        for operation in operations(Store(server.location)).values():
            with pytest.raises(UserError, match=f"bucket 'bucket' does not exist at {server.location.endpoint}"):
                operation()


def test_reading_a_missing_bucket_of_the_real_store_is_the_users_error(store: Store) -> None:
    other = Store(replace(store.location, bucket="there-is-no-such-bucket"))
    for operation in ("get", "list", "read_versioned"):
        with pytest.raises(UserError, match="'there-is-no-such-bucket' does not exist at http"):
            operations(other)[operation]()


def test_a_bucket_that_cannot_be_is_the_users_error(store: Store) -> None:
    with pytest.raises(UserError, match="s3://no bucket/x: Parameter validation failed: Invalid bucket name"):
        Store(replace(store.location, bucket="no bucket", prefix="")).get("x")


def test_an_object_that_goes_while_it_is_read_is_the_users_error(store: Store) -> None:
    store.put("x", b"0123456789")
    (entry,) = store.list_entries("x")
    assert store.get_range("x", 2, 4, etag=entry.etag) == b"23"
    store.delete("x")
    with pytest.raises(UserError, match="x was removed while it was read"):
        store.get_range("x", 4, 6, etag=entry.etag)


def test_no_credentials_are_the_users_error(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, f"{tmp_path}/none")
    with pytest.raises(UserError, match="check the credentials"):
        Store(store.location).create_versioned("x", {})


@pytest.mark.usefixtures("quick_retries")
def test_a_store_that_is_away_is_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeS3() as server:
        location = server.location
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anything")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    for operation in operations(Store(location)).values():
        with pytest.raises(InfrastructureError, match=f"s3://bucket/x?: the store at {location.endpoint} failed"):
            operation()


@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "TokenRefreshRequired")])
def test_a_session_token_that_was_renewed_is_taken_up(tmp_path: Path, status: int, code: str) -> None:
    """Until then it is no mistake in the input: who asks again may get an answer."""
    credentials = tmp_path / "credentials"

    def renew(token: str) -> None:
        credentials.write_text(
            f"[default]\naws_access_key_id = a\naws_secret_access_key = s\naws_session_token = {token}\n"
        )

    with FakeS3() as server, pytest.MonkeyPatch.context() as environment:  # the fake sets some, too
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.delenv(name)
        environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
        renew("old")
        store = Store(server.location)
        store.create_versioned("x", {})
        server.refuses = (status, code)
        for name, operation in operations(store).items():
            if name != "list":
                with pytest.raises(
                    InfrastructureError, match=rf"x: the session token has expired \({code}\): renew it"
                ):
                    operation()
        assert set(server.tokens) == {"old"}
        renew("new")
        server.refuses = None
        server.tokens.clear()
        store.get("x")
        store.create_versioned("y", {})
        assert set(server.tokens) == {"new"}


def test_a_wrong_clock_is_called_that() -> None:
    with FakeS3() as server:
        server.refuses = (403, "RequestTimeTooSkewed")
        for operation in operations(Store(server.location)).values():
            with pytest.raises(
                InfrastructureError, match=r"this machine's clock .* there Sun, 09 Sep 2001 00:00:00 GMT"
            ):
                operation()


# ---- the probe -------------------------------------------------------------------------------------------------------


class HangsUp(BaseRequestHandler):
    """Takes a request, and closes the connection without a word."""

    def handle(self) -> None:
        self.request.recv(1)


@pytest.mark.usefixtures("quick_retries")
def test_a_store_that_hangs_up_is_an_infrastructure_error(store: Store) -> None:
    with ThreadingTCPServer(("127.0.0.1", 0), HangsUp) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        location = replace(store.location, endpoint=f"http://127.0.0.1:{server.server_address[1]}")
        for operation in operations(Store(location)).values():
            with pytest.raises(InfrastructureError, match=f"the store at {location.endpoint} failed"):
                operation()
        server.shutdown()


def test_the_real_store_passes_the_probe_and_nothing_is_left(store: Store) -> None:
    store.probe()
    assert list(store.list_keys("")) == []


def test_the_fake_passes_the_probe_when_it_honours_both() -> None:
    """So the refusals below are for what they say."""
    with FakeS3(create_only=True, if_match=True) as server:
        Store(server.location).probe()


@pytest.mark.parametrize(
    ("create_only", "if_match", "named"),
    [(False, False, "If-None-Match"), (False, True, "If-None-Match"), (True, False, "If-Match")],
)
def test_a_store_that_ignores_conditions_is_refused_by_name(create_only: bool, if_match: bool, named: str) -> None:
    with FakeS3(create_only=create_only, if_match=if_match) as server:
        with pytest.raises(UserError, match=rf"the store at {server.location.endpoint} ignores .*\({named}\)"):
            Store(server.location).probe()
        assert server.objects == {}
