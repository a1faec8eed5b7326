"""What Prefect reads back as a result is a document, never code: whoever can write its storage can run nothing here.

Prefect takes from a stored result itself how it is to be read, pickle included, and calls whatever its JSON names.
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any

from pydantic.errors import PydanticUserError

from training.documents import parse
from training.errors import DamagedError

OURS = ("flows.", "tasks.", "training.")


def read_documents_only() -> None:
    """Have Prefect, in this process, read results by `loaded` alone."""
    from prefect.serializers import CompressedSerializer, JSONSerializer, PickleSerializer

    for kind in (PickleSerializer, CompressedSerializer):
        kind.loads = _refused  # type: ignore[method-assign]  # there is no setting for it
    JSONSerializer.loads = lambda self, blob: loaded(blob)  # type: ignore[method-assign]


def _refused(self: Any, blob: bytes) -> Any:
    raise DamagedError(f"a stored result says that it is {self.type}, which may run code: only JSON is read")


def loaded(blob: bytes) -> Any:
    """A result as Prefect's JSON serializer writes it. Raises `DamagedError` for what names anything to be called."""
    try:
        return json.loads(blob.decode(), object_hook=_made)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"a stored result is damaged: {error}") from error


def _made(document: dict[str, Any]) -> Any:
    if "__class__" in document:
        kind = _known(document["__class__"])
        if not (isinstance(kind, type) and is_dataclass(kind) and kind.__module__.startswith(OURS)):
            raise DamagedError(f"a stored result names {document['__class__']!r}, which is no document of this project")
        try:
            return parse(kind, document.get("data"))
        except (PydanticUserError, NameError) as error:
            raise DamagedError(f"a stored result names {document['__class__']!r}, which is never stored") from error
    if "__exc_type__" in document:
        kind = _known(document["__exc_type__"])
        message = str(document.get("message", ""))
        if isinstance(kind, type) and issubclass(kind, Exception):
            with suppress(Exception):  # else it asks for more than a message
                return kind(message)
        return RuntimeError(f"{document['__exc_type__']}: {message}")
    return document


def _known(name: Any) -> Any:
    """Of one of our modules, or one that is imported already: to import one is to run it."""
    module, _, attribute = str(name).rpartition(".")
    if module.startswith(OURS):
        with suppress(ImportError):
            importlib.import_module(module)
    return vars(sys.modules[module]).get(attribute) if module in sys.modules else None
