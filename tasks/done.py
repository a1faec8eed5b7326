"""What a stage gave, where whoever starts it next finds it: a flow, `dvc repro` or the command line.

Prefect's cache holds the same, under the same keys, but for flows alone.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any, TypeVar

from training.documents import canonical_json, digest_of, parse
from training.errors import DamagedError
from training.objectstore import MissingError, Store

log = logging.getLogger(__name__)
Result = TypeVar("Result")


def find_result(store: Store, key: str, kind: type[Result]) -> Result | None:
    """The result that was kept under `key`; None if there is none. A damaged one is made anew, and then replaced."""
    try:
        return parse(kind, _unsealed(store.get(key), key))
    except MissingError:
        return None
    except DamagedError as error:
        log.warning("%s", error)
        return None


def keep_result(store: Store, key: str, result: Any) -> None:
    """Keep a stage's result, a dataclass, under a key that says all that it is a function of."""
    document = asdict(result)
    store.put_immutable(key, canonical_json({"result": document, "sha256": digest_of(document)}))


def _unsealed(data: bytes, key: str) -> Any:
    try:
        sealed = json.loads(data)
        if digest_of(sealed["result"]) == sealed["sha256"]:
            return sealed["result"]
    except (ValueError, KeyError, TypeError):
        pass
    raise DamagedError(f"{key} is damaged: the stage is done again")
