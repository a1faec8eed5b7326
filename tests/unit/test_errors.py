"""Errors are split by who must act; the exit codes are what agents, engines and the command line go by."""

from __future__ import annotations

import pickle

from training import errors
from training.errors import MissingError, UnbrokenError


def test_every_error_has_an_exit_code_of_its_own() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, UnbrokenError)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes == {
        "UnbrokenError": 1,
        "UserError": 2,
        "InfrastructureError": 3,
        "MissingError": 3,
        "DeterministicError": 4,
        "FencedError": 5,
        "DamagedError": 6,
        "UntrustedError": 6,
        "OutOfMemoryError": 7,
        "RedDrillError": 8,
        "OvertakenError": 9,
        "RefusedError": 10,
        "CancelledError": 130,
    }


def test_a_missing_object_is_an_infrastructure_error() -> None:
    assert issubclass(MissingError, errors.InfrastructureError)
    assert MissingError.exit_code == 3


def test_a_record_names_an_error_by_its_class() -> None:
    found = errors.error_of("DeterministicError", "why", ["a.csv:3"])
    assert isinstance(found, errors.DeterministicError)
    assert (str(found), found.records) == ("why", ("a.csv:3",))
    again = pickle.loads(pickle.dumps(found))  # as Prefect keeps what a task raised
    assert (str(again), again.records) == ("why", ("a.csv:3",))
    assert type(errors.error_of("OutOfMemoryError", "why")) is errors.OutOfMemoryError
