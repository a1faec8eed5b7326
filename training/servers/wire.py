"""Messages as bytes: the head of a safetensors file that says what the message is, and then its tensors, not copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from training import tensorfile
from training.arithmetic.reduce import Subtree
from training.arithmetic.sparse import Rows
from training.checkpoints.snapshot import bytes_of
from training.documents import canonical_json, read_document
from training.errors import DamagedError
from training.servers import protocol, stale_protocol
from training.servers.arithmetic import Decision, Report
from training.servers.rows import Part
from training.servers.stale_state import Contribution, Reading

MAX_HEAD_BYTES = 1 << 26
KINDS = {
    kind.__name__: kind
    for kind in (
        *(protocol.Push, protocol.Apply, protocol.Pull, protocol.Held, protocol.Decided, protocol.Values),
        *(protocol.Standing, protocol.Hold, protocol.Commit, protocol.Fetch, protocol.Copy, protocol.Reached),
        protocol.Left,
        *(stale_protocol.Join, stale_protocol.Joined, stale_protocol.Update, stale_protocol.Read, stale_protocol.Fresh),
        *(Subtree, Report, Decision, Part, Rows, Contribution, Reading),
    )
}
"""What may come, alone or inside of another."""


def encode(message: protocol.Message) -> tuple[bytes, list[memoryview]]:
    """The head, and the bytes of the tensors where they lie."""
    tensors: list[Tensor] = []
    body = canonical_json(_packed(message, tensors)).decode()
    entries = [
        (str(number), str(tensor.dtype).removeprefix("torch."), tensor.shape, tensor.nbytes)
        for number, tensor in enumerate(tensors)
    ]
    return tensorfile.header(entries, __metadata__={"message": body}), [bytes_of(tensor) for tensor in tensors]


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"tensor": len(tensors) - 1}
    if is_dataclass(value):
        return {type(value).__name__: {one.name: _packed(getattr(value, one.name), tensors) for one in fields(value)}}
    if isinstance(value, tuple | list):
        return [_packed(one, tensors) for one in value]
    if isinstance(value, dict):
        return {"dict": [[key, _packed(one, tensors)] for key, one in value.items()]}
    return value


def decode(
    read_into: Callable[[memoryview], None], read_body: Callable[[int], Tensor] | None = None, *, max_bytes: int
) -> protocol.Message:
    """The next message. `read_into` fills what it is given; `read_body` gives so many bytes, in which the tensors lie
    then: without it, they are read into new memory.

    Raises `DamagedError` for what is no message, or has tensors of more than `max_bytes` in all.
    """
    head = _read_head(read_into)
    places = tensorfile.layout(memoryview(head))
    num_bytes = _num_body_bytes(places, len(head))
    if num_bytes > max_bytes:
        raise DamagedError(f"a message of more than {max_bytes} bytes")
    metadata = read_document(head[8:], what="a message").get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("message"), str):
        raise DamagedError("a message does not say what it is")
    body = read_document(metadata["message"], what="a message")
    bytes_read = read_body(num_bytes) if read_body else _read_new(read_into, num_bytes)
    tensors = {
        name: _tensor(bytes_read[place.start - len(head) : place.stop - len(head)], place)
        for name, place in places.items()
    }
    try:
        message = _unpacked(body, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"a message says what cannot be: {error!r}") from error
    if not isinstance(message, protocol.Message):
        raise DamagedError(f"a message is a {type(message).__name__}")
    return message


def _num_body_bytes(places: tensorfile.Layout, num_head_bytes: int) -> int:
    """Tensors lie end to end."""
    end = num_head_bytes
    for place in places.values():
        if place.start != end:
            raise DamagedError("a message whose tensors do not lie end to end")
        end = place.stop
    return end - num_head_bytes


def _read_new(read_into: Callable[[memoryview], None], num_bytes: int) -> Tensor:
    found = torch.empty(num_bytes, dtype=torch.uint8)
    if num_bytes:
        read_into(bytes_of(found))
    return found


def _tensor(part: Tensor, place: tensorfile.Place) -> Tensor:
    """Not copied, unless it lies where such elements cannot."""
    if part.storage_offset() % place.dtype.itemsize:
        part = part.clone()
    return part.view(place.dtype).view(place.shape)


def decode_from(data: memoryview) -> protocol.Message:
    """The message that lies there; nothing of it does afterwards."""

    def read_into(view: memoryview) -> None:
        nonlocal data
        view[:], data = data[: len(view)], data[len(view) :]

    return decode(read_into, max_bytes=len(data))


def _read_head(read_into: Callable[[memoryview], None]) -> bytes:
    length = bytearray(8)
    read_into(memoryview(length))
    num_bytes = int.from_bytes(length, "little")
    if num_bytes > MAX_HEAD_BYTES:
        raise DamagedError(f"a message begins with {num_bytes} bytes")
    text = bytearray(num_bytes)
    read_into(memoryview(text))
    return bytes(length + text)


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_unpacked(one, tensors) for one in value)
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[str(inner)]
    if kind == "dict":
        return {key: _unpacked(one, tensors) for key, one in inner}
    return _made(KINDS[kind], {name: _unpacked(one, tensors) for name, one in inner.items()})


def _made(kind: type[Any], values: dict[str, Any]) -> Any:
    """Steps, tokens and positions are whole numbers."""
    for name in ("token", "step", "clock", "barrier", "position", "start", "size"):
        if name in values and type(values[name]) is not int:
            raise ValueError(f"{name} = {values[name]!r}")
    return kind(**values)
