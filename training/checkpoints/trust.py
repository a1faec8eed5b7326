"""What a run record says of the model's bytes, signed (training.signatures): its checkpoints and its result.

A checkpoint's signature is over the run key, the generation, the step, the token and the manifest's digest, and so over
the digests of all parts. It lies beside that digest in the record: signing anew changes no object.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from training.runs.record import CheckpointRef, Record, Result, RunRecord
from training.signatures import require_signed, sign

CHECKPOINT, RESULT = "checkpoint", "result"


def signed_checkpoint(prefix: str, reference: CheckpointRef) -> CheckpointRef:
    """With this process's signature, or none if it has no key. `prefix` is that of the run's generation."""
    return replace(reference, signature=sign(CHECKPOINT, _content(prefix, reference)))


def signed_result(prefix: str, result: Result) -> Result:
    """With this process's signature, or none if it has no key."""
    return replace(result, signature=sign(RESULT, _content(prefix, result)))


def require_signed_checkpoint(prefix: str, reference: CheckpointRef, *, name: str) -> None:
    """Raises `UntrustedError`, if this process has a key and none of its keys signed it."""
    content = _content(prefix, reference)
    require_signed(CHECKPOINT, content, reference.signature, name=name, remedy=_remedy(prefix))


def trusted_result(run: RunRecord, record: Record) -> Result:
    """A finished run's result. Raises `UntrustedError`, if this process has keys and none of them signed it."""
    assert record.result is not None
    prefix, name = run.prefix(record), f"the result in {run.store.location.uri(run.object_key)}"
    content = _content(prefix, record.result)
    require_signed(RESULT, content, record.result.signature, name=name, remedy=_remedy(prefix))
    return record.result


def resigned(run: RunRecord, record: Record) -> Record:
    """The record, all that it names signed with this process's key: for whoever knows that it is what it should be."""
    prefix = run.prefix(record)
    checkpoints = tuple(signed_checkpoint(prefix, reference) for reference in record.checkpoints)
    if record.result is None:
        return replace(record, checkpoints=checkpoints)
    result = replace(record.result, checkpoint=signed_checkpoint(prefix, record.result.checkpoint))
    return replace(record, checkpoints=checkpoints, result=signed_result(prefix, result))


def what_is_signed(record: Record) -> tuple[object, ...]:
    """Of a record: if it is the same, so is what `resigned` would sign."""
    return record.generation, record.checkpoints, record.result


def _content(prefix: str, signed: CheckpointRef | Result) -> dict[str, Any]:
    content = {**asdict(signed), "signature": None, "prefix": prefix}
    if content.get("inexact", "") is None:
        del content["inexact"]  # an exact result is signed as ever
    return content


def _remedy(prefix: str) -> str:
    return f"`unbroken ckpt sign {prefix.split('/')[1][:12]}` signs it, and `--fresh` trains without it"
