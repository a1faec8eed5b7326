"""What a stage gave, where whoever starts it next finds it: a flow, `dvc repro` or the command line.

Prefect's cache holds the same, under the same keys, but for flows alone.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any, TypeVar

from training.documents import parse, sealed, unsealed
from training.errors import DamagedError, MissingError
from training.s3.objectstore import Store

log = logging.getLogger(__name__)
Result = TypeVar("Result")


def find_result(store: Store, key: str, kind: type[Result]) -> Result | None:
    """The result that was kept under `key`; None if there is none. A damaged one is made anew, and then replaced."""
    try:
        return parse(kind, unsealed("result", store.get(key)))
    except MissingError:
        return None
    except DamagedError as error:
        log.warning("%s is damaged, and the stage is done again: %s", key, error)
        return None


def keep_result(store: Store, key: str, result: Any) -> None:
    """Keep a stage's result, a dataclass, under a key that says all that it is a function of."""
    store.put_immutable(key, sealed("result", asdict(result)))
