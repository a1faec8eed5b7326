"""Ports: those of last time, the usual ones, else free ones; one that was asked for is never changed quietly."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from infra.local import ports
from infra.local.ports import INTERNAL, LOOPBACK, USUAL, choose_ports, free_port
from training.errors import UserError


@pytest.fixture(autouse=True)
def _no_ports_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in USUAL:
        monkeypatch.delenv(f"UNBROKEN_{name.upper()}_PORT", raising=False)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which this process listens."""
    with socket.create_server((LOOPBACK, 0)) as server:
        yield int(server.getsockname()[1])


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port that nobody else on this machine takes meanwhile, as far as is seen."""
    port, sees = free_port(), ports.is_free
    monkeypatch.setattr(ports, "is_free", lambda asked: asked == port or sees(asked))
    return port


def test_every_service_gets_a_port_of_its_own() -> None:
    chosen = choose_ports({}, {})
    assert set(chosen) >= {*USUAL, *INTERNAL}
    assert len(set(chosen.values())) == len(chosen)


def test_ports_of_last_time_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose_ports({}, {})
    monkeypatch.setattr(ports, "is_free", lambda port: port in first.values())
    assert choose_ports(first, {}) == first


def test_usual_port_that_is_taken_is_replaced(taken: int, mine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.local.ports.USUAL", {"s3": taken, "mlflow": mine, "prefect": taken})
    chosen = choose_ports({}, {})
    assert chosen["mlflow"] == mine
    assert taken not in chosen.values()


def test_port_of_last_time_that_is_taken_is_replaced(taken: int) -> None:
    assert taken not in choose_ports({"s3": taken, "volume": taken}, {}).values()


def test_port_that_was_lost_is_not_chosen_again_although_it_looks_free() -> None:
    mine = free_port()
    chosen = choose_ports({"s3": mine, "filer": mine + 1}, {}, lost={mine, mine + 1, USUAL["s3"]})
    assert {mine, mine + 1, USUAL["s3"]}.isdisjoint(chosen.values())


def test_port_taken_on_every_address_counts_as_taken() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = int(server.getsockname()[1])
        assert port not in choose_ports({"s3": port}, {}).values()


def test_environment_wins_over_file(mine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    other = free_port()
    monkeypatch.setenv("UNBROKEN_S3_PORT", str(mine))
    assert choose_ports({}, {"s3": other})["s3"] == mine


def test_configured_port_in_use_names_port_and_holder(taken: int) -> None:
    with pytest.raises(UserError) as caught:
        choose_ports({}, {"mlflow": taken})
    message = str(caught.value)
    assert f"port {taken}, configured for mlflow, is in use" in message
    assert f"(process {os.getpid()})" in message
    assert "UNBROKEN_MLFLOW_PORT" in message


def test_port_configured_for_two_services_is_refused(mine: int) -> None:
    with pytest.raises(UserError, match=f"{mine} is configured for two services"):
        choose_ports({}, {"s3": mine, "prefect": mine})


def test_service_without_a_setting_makes_room_for_one_with(mine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may want MLflow where S3 usually listens."""
    monkeypatch.setattr("infra.local.ports.USUAL", {**USUAL, "s3": mine})
    chosen = choose_ports({}, {"mlflow": mine})
    assert chosen["mlflow"] == mine
    assert chosen["s3"] != mine


@pytest.mark.parametrize("wanted", ["many", "70000", "0", "-1"])
def test_port_that_is_none_is_refused_by_name(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBROKEN_PREFECT_PORT", wanted)
    with pytest.raises(UserError, match=f"prefect.*{wanted}"):
        choose_ports({}, {})
