"""The body of a request to an array that the model can take, or one sentence that says what is wrong with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from tasks.lifecycle.model_file import Tensor
from training.errors import UserError

TABLES = ("dataframe_split", "dataframe_records")
ARRAYS = ("inputs", "instances")
ALLOWED_KINDS = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}
"""By the kind of what is expected: the kinds that JSON's values may have made of themselves."""
QUOTES = 2
"""Of a body without text: those of its field's name."""
KIND_WORDS = {"f": "a number", "i": "a whole number", "u": "a whole number", "b": "true or false"}


class BadRequestError(UserError):
    """Whoever sent the request must act."""


def array_of(body: bytes, expected: Tensor) -> np.ndarray[Any, Any]:
    """What is to be predicted, exactly of the dtype and shape that are expected. Raises `BadRequestError`."""
    name, values = _values(_json(body), expected)
    if not isinstance(values, list):
        raise BadRequestError(f"{name}: expected {described(expected)}, found {_kind(values)}")
    if not values:
        raise BadRequestError(f"{name}: the batch is empty: expected {described(expected)}")
    if body.count(b'"') > QUOTES:  # numpy would give every item the room of the longest text
        raise BadRequestError(_explanation(name, values, expected, "text"))
    try:
        array = np.array(values)
    except ValueError:  # rows of different lengths, or too deep
        raise BadRequestError(_explanation(name, values, expected, "arrays of different lengths")) from None
    dtype = np.dtype(expected.dtype)
    if not _fits(array.shape, expected.shape) or array.dtype.kind not in ALLOWED_KINDS[dtype.kind]:
        raise BadRequestError(_explanation(name, values, expected, f"shape {array.shape}"))
    return _converted(name, array, dtype)


def described(tensor: Tensor) -> str:
    """For a reader."""
    sizes = ", ".join("batch" if place == 0 else str(size) for place, size in enumerate(tensor.shape))
    return f"a {tensor.dtype} array of shape ({sizes})"


def _json(body: bytes) -> Any:
    if not body:
        raise BadRequestError('the body is empty: expected {"inputs": …}')
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        hint = " (JSON has no NaN and no Infinity)" if b"NaN" in body or b"Infinity" in body else ""
        raise BadRequestError(f"the body is not JSON: {error}{hint}") from None


def _values(document: Any, expected: Tensor) -> tuple[str, Any]:
    """The one field that holds the data, by its name."""
    if not isinstance(document, dict):
        raise BadRequestError(f'the body is {_kind(document)}: expected an object, {{"inputs": …}}')
    for name in document:
        if name in TABLES:
            raise BadRequestError(
                f'{name}: this model takes {described(expected)}, not a table: send it as {{"inputs": …}}'
            )
        if name not in ARRAYS:
            raise BadRequestError(f'{name}: unknown field: expected {{"inputs": …}} or {{"instances": …}} alone')
    if len(document) != 1:
        raise BadRequestError('expected either "inputs" or "instances" in the body')
    return next(iter(document.items()))


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(
        wanted in (-1, size) for size, wanted in zip(shape, expected, strict=True)
    )


def _converted(name: str, array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Raises `BadRequestError` naming the first number that `dtype` cannot hold."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            made = array.astype(dtype)
        is_wrong = ~np.isfinite(made)
    elif dtype.kind in "iu":
        made, limits = array.astype(dtype), np.iinfo(dtype)
        is_wrong = (array < limits.min) | (array > limits.max)
    else:
        return array
    if is_wrong.any():
        place = tuple(int(index) for index in np.argwhere(is_wrong)[0])
        where = name + "".join(f"[{index}]" for index in place)
        raise BadRequestError(f"{where}: {array[place]} is too large for {dtype}")
    return made


def _explanation(name: str, values: Any, expected: Tensor, otherwise: str) -> str:
    kind = np.dtype(expected.dtype).kind
    wrong = _first_wrong(values, expected.shape, kind, name) or f"{name}: found {otherwise}"
    return f"{wrong}; expected is {described(expected)}"


def _first_wrong(value: Any, shape: tuple[int, ...], kind: str, where: str) -> str | None:
    """Only as deep as the shape goes, however deep the value is."""
    if not shape:
        return None if _is_of(value, kind) else f"{where}: expected {KIND_WORDS[kind]}, found {_kind(value)}"
    if not isinstance(value, list):
        return f"{where}: expected an array, found {_kind(value)}"
    if shape[0] not in (-1, len(value)):
        return f"{where}: expected {shape[0]} items, found {len(value)}"
    wrong = (_first_wrong(item, shape[1:], kind, f"{where}[{index}]") for index, item in enumerate(value))
    return next((one for one in wrong if one is not None), None)


def _is_of(value: Any, kind: str) -> bool:
    if kind == "b" or isinstance(value, bool):
        return kind == "b" and isinstance(value, bool)
    return isinstance(value, int if kind in "iu" else (int, float))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 20 else value[:20] + '…'!r}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return "an object" if isinstance(value, dict) else "an array"
