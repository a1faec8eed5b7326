"""Saving: all ranks write in parallel off the training thread, read back, and rank 0 has the run record name it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor

from training.checkpoints.checkpoint import CheckpointManifest, PartInfo, Slice, TensorInfo, folder
from training.checkpoints.snapshot import Snapshot
from training.checkpoints.trust import signed_checkpoint
from training.documents import canonical_json, parse, read_json, sha256_hex
from training.errors import DeterministicError, InfrastructureError
from training.runs.record import CheckpointRef, Record, RunRecord, with_checkpoint, with_retention

if TYPE_CHECKING:
    from torch.distributed import Store as Rendezvous  # type: ignore[attr-defined]  # public, but not listed

FAILED_RECEIPT = "null"
_FOLDER = re.compile(r"(\d{8,18})-(\d{6,18})", re.ASCII)
NOTHING: Mapping[str, str] = MappingProxyType({})
PARTS_SECONDS = 300.0
SLICE_SECONDS = 5.0


def assign_parts(sizes: Mapping[str, int], num_parts: int) -> dict[str, int]:
    """Which part each tensor goes to: the largest first, each to the emptiest part. A pure function."""
    filled = [0] * num_parts
    owner: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        part = filled.index(min(filled))
        owner[name] = part
        filled[part] += sizes[name]
    return owner


class CheckpointSaver:
    """Saves a rank's share of the state in the background; rank 0 commits when all shares are proven.

    Ranks meet through the group's rendezvous store, never through collectives: those belong to the training thread.
    """

    def __init__(
        self,
        *,
        run: RunRecord,
        prefix: str,
        rendezvous: Rendezvous,
        rank: int,
        world_size: int,
        token: int,
        keep: int,
        keep_every_steps: int | None = None,
        before_commit: Callable[[], None],
    ) -> None:
        """`prefix` is where the objects of this generation of the run lie."""
        self._run = run
        self._rendezvous = rendezvous
        self._rank = rank
        self._world_size = world_size
        self._token = token
        self._keep = keep
        self._keep_every_steps = keep_every_steps
        self._snapshot = Snapshot()
        self._before_commit = before_commit
        self._prefix = prefix
        self._is_abandoned = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        *,
        agreed: Mapping[str, str] = NOTHING,
        on_commit: Callable[[CheckpointRef], None],
    ) -> int:
        """Copy this rank's share now, and write it in the background. Waits for the one before. Returns how many bytes
        that share has.

        `agreed` must be the same on all ranks, or there is no checkpoint, but a `DeterministicError` naming the entry.
        """
        self.wait()
        owner = assign_parts({name: t.nbytes for name, t in tensors.items()}, self._world_size)
        part = self._snapshot.take({name: t for name, t in tensors.items() if owner[name] == self._rank})
        infos = {
            name: TensorInfo(
                dtype=str(t.dtype),
                shape=tuple(t.shape),
                slices=(Slice(part=owner[name], start=(0,) * t.dim(), shape=tuple(t.shape)),),
            )
            for name, t in tensors.items()
        }
        self._thread = threading.Thread(
            target=self._write, args=(step, part, infos, agreed, on_commit), name="checkpoint", daemon=True
        )
        self._thread.start()
        return len(part)

    def require_agreement(self, resumed_from: int) -> None:
        """Raises `InfrastructureError` if another rank read the store differently, and took up another checkpoint."""
        if self._rank == 0:
            self._rendezvous.set("resumed-from", str(resumed_from))
        elif int(self._rendezvous.get("resumed-from")) != resumed_from:
            raise InfrastructureError(f"rank {self._rank} resumed from step {resumed_from}, and rank 0 did not")

    def is_settled(self, patience_seconds: float) -> bool:
        """Whether no save is under way, if need be after a while; on rank 0: not on any rank."""
        if self._thread is not None:
            self._thread.join(patience_seconds)
        return self._thread is None or not self._thread.is_alive()

    def wait_for_rank_0(self, step: int, seconds: float) -> None:
        """Until rank 0 has come here too, or is gone, or the time is over: whoever goes before it has committed may let
        it be fenced off."""
        if self._rank == 0:
            self._rendezvous.set(f"checkpoint/{step}/done", "1")
        else:
            with suppress(RuntimeError):
                self._rendezvous.wait([f"checkpoint/{step}/done"], timedelta(seconds=max(seconds, 0.1)))  # 0: for ever

    def abandon(self) -> None:
        """The group is over: a save under way is not waited for, neither here nor by its own thread for long."""
        self._is_abandoned.set()

    def wait(self) -> None:
        """Until the save under way is committed (on rank 0) or sent (elsewhere). Raises what made it fail."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(
        self,
        step: int,
        part: bytearray,
        infos: Mapping[str, TensorInfo],
        agreed: Mapping[str, str],
        on_commit: Callable[[CheckpointRef], None],
    ) -> None:
        try:
            self._hand_in(step, part, agreed)
        except Exception as error:  # handed to the training thread, which decides
            self._error = error
        if self._rank == 0:
            try:
                reference, record = self._commit(step, infos)  # not before all ranks are done, even if it must fail
                on_commit(reference)
                self._delete_unnamed(reference, record)
            except Exception as error:
                self._error = self._error or error

    def _hand_in(self, step: int, data: bytearray, agreed: Mapping[str, str]) -> None:
        """Write this rank's part, and tell rank 0: also that it failed, or rank 0 would wait in vain."""
        receipt = FAILED_RECEIPT
        try:
            part = self._write_proven(step, f"part-{self._rank}.safetensors", data)
            receipt = canonical_json({"part": asdict(part), "agreed": dict(agreed)}).decode()
        finally:
            self._rendezvous.set(_part_receipt(step, self._rank), receipt)

    def _write_proven(self, step: int, name: str, data: bytes | bytearray) -> PartInfo:
        sha256 = sha256_hex(data)
        self._run.store.put_proven(folder(self._prefix, step, self._token) + name, data, sha256=sha256)
        return PartInfo(name=name, sha256=sha256, num_bytes=len(data))

    def _commit(self, step: int, infos: Mapping[str, TensorInfo]) -> tuple[CheckpointRef, Record]:
        receipts = [_part_receipt(step, rank) for rank in range(self._world_size)]
        self._wait_for(receipts, step)
        documents = [read_json(self._rendezvous.get(receipt), what="a receipt") for receipt in receipts]
        if None in documents:
            raise InfrastructureError(f"checkpoint {step}: rank {documents.index(None)} could not write its part")
        _require_agreed(step, [document["agreed"] for document in documents])
        parts = tuple(parse(PartInfo, document["part"]) for document in documents)
        manifest = CheckpointManifest(step=step, tensors=dict(infos), parts=parts)
        proven = self._write_proven(step, "manifest.json", canonical_json(asdict(manifest)))
        self._before_commit()
        unsigned = CheckpointRef(step=step, token=self._token, sha256=proven.sha256)
        reference = signed_checkpoint(self._prefix, unsigned)
        return reference, self._name(reference)

    def _wait_for(self, receipts: list[str], step: int) -> None:
        """All of them; in slices, as a wait at the rendezvous cannot be ended. Raises `InfrastructureError`."""
        deadline = time.monotonic() + PARTS_SECONDS
        while True:
            begun = time.monotonic()
            try:
                return self._rendezvous.wait(receipts, timedelta(seconds=SLICE_SECONDS))
            except RuntimeError as error:
                is_slice_over = time.monotonic() - begun > 0.9 * SLICE_SECONDS  # else the rendezvous is gone
                if not is_slice_over or self._is_abandoned.is_set() or time.monotonic() > deadline:
                    raise InfrastructureError(f"checkpoint {step}: not all ranks wrote their part: {error}") from error

    def _name(self, reference: CheckpointRef) -> Record:
        """In the record, which names those that are too old no more."""
        return self._run.update(
            lambda record: with_retention(
                with_checkpoint(record, reference),
                token=self._token,
                keep=self._keep,
                keep_every_steps=self._keep_every_steps,
            )
        )

    def _delete_unnamed(self, newest: CheckpointRef, record: Record) -> None:
        """What the record names no more, and what it never did: begun by a group that died, or by a save that failed.

        What is quarantined stays, to be looked at. If the store is away, the next commit tries again.
        """
        known = (*record.checkpoints, *(quarantined.checkpoint for quarantined in record.quarantined))
        kept = {(checkpoint.token, checkpoint.step) for checkpoint in known}
        with suppress(InfrastructureError):
            for name in self._run.store.list_folders(f"{self._prefix}checkpoints/"):
                match = _FOLDER.fullmatch(name)
                if match is None:  # nobody's of ours
                    continue
                step, token = int(match[1]), int(match[2])
                if (token, step) < (newest.token, newest.step) and (token, step) not in kept:
                    for key, _ in list(self._run.store.list_keys(folder(self._prefix, step, token))):
                        self._run.store.delete(key)


def _require_agreed(step: int, answers: Sequence[Mapping[str, str]]) -> None:
    for name, digest in answers[0].items():
        if any(answer.get(name) != digest for answer in answers):
            raise DeterministicError(
                f"after step {step} the ranks have different values of buffer {name}: the recipe's model must change it"
                " alike for every microbatch, or keep it as floats, which are averaged"
            )


def _part_receipt(step: int, rank: int) -> str:
    return f"checkpoint/{step}/part/{rank}"
