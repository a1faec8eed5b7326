"""Errors are split by who must act; the exit codes are what agents, engines and the command line go by."""

from __future__ import annotations

from training import errors
from training.errors import UnbrokenError
from training.objectstore import MissingError


def test_every_error_has_an_exit_code_of_its_own() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, UnbrokenError)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes == {
        "UnbrokenError": 1,
        "UserError": 2,
        "InfrastructureError": 3,
        "DeterministicError": 4,
        "FencedError": 5,
        "DamagedError": 6,
        "CancelledError": 130,
    }


def test_a_missing_object_is_an_infrastructure_error() -> None:
    assert issubclass(MissingError, errors.InfrastructureError)
    assert MissingError.exit_code == 3
