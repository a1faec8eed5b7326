"""Checkpoints on a real store: proven before they are named, never believed when damaged, fenced by their token."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.faults.evidence import write_evidence
from tests.unit.fakes import DictRendezvous, FaultyStore, MemoryStore
from training.checkpoints.checkpoint import (
    CheckpointManifest,
    folder,
    load_checkpoint,
    newest_proven,
)
from training.checkpoints.saver import CheckpointSaver, assign_parts
from training.checkpoints.state import tensors_sha256
from training.documents import parse, sha256_hex
from training.errors import DamagedError, DeterministicError, FencedError, InfrastructureError
from training.runs.record import CheckpointRef, RunRecord, with_quarantined
from training.s3.objectstore import Buffer, Store, Versioned

Damage = Callable[[Store, str], None]


def tensors_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(9, 4, generator=generator),
        "model.bias": torch.randn(4, generator=generator),
        "model.half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "model.counter": torch.tensor(step),
        "optimizer.step.weight": torch.tensor(float(step)),
        "optimizer.exp_avg.weight": torch.randn(9, 4, generator=generator),
    }


@dataclass(kw_only=True)
class Group:
    """The savers of all ranks of one token, in one process."""

    run: RunRecord
    world_size: int = 1
    token: int = 1
    keep: int = 9
    keep_every_steps: int | None = None
    before_commit: Callable[[], None] = lambda: None
    rendezvous: DictRendezvous = field(default_factory=DictRendezvous)

    def __post_init__(self) -> None:
        self.savers = [
            CheckpointSaver(
                run=self.run,
                prefix=self.run.prefix(self.run.read()),
                rendezvous=self.rendezvous,  # type: ignore[arg-type]  # it has all that is used
                rank=rank,
                world_size=self.world_size,
                token=self.token,
                keep=self.keep,
                keep_every_steps=self.keep_every_steps,
                before_commit=self.before_commit,
            )
            for rank in range(self.world_size)
        ]

    def save(self, step: int, tensors: Mapping[str, Tensor] | None = None) -> CheckpointRef:
        """All ranks save at once; returns what rank 0 committed."""
        committed: list[CheckpointRef] = []
        for saver in reversed(self.savers):
            saver.save(step, tensors or tensors_of(step), on_commit=committed.append)
        for saver in self.savers:
            saver.wait()
        (reference,) = committed
        return reference


@pytest.fixture
def run(store: Store) -> RunRecord:
    record = RunRecord(store, "k")
    record.create_if_missing()
    record.update(lambda r: replace(r, token=1))
    return record


def flip(store: Store, key: str) -> None:
    data = store.get(key)
    store.put(key, data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])


def truncate(store: Store, key: str) -> None:
    store.put(key, store.get(key)[:-1])


def delete(store: Store, key: str) -> None:
    store.delete(key)


def objects(run: RunRecord) -> list[str]:
    return [key for key, _ in run.store.list_keys("runs/k/0/checkpoints/")]


# ---- which part holds what -------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(max_size=4), st.integers(0, 10**6), max_size=30), st.integers(1, 8))
@settings(derandomize=True, max_examples=200)
def test_every_tensor_has_one_part_and_parts_are_balanced(sizes: dict[str, int], num_parts: int) -> None:
    owner = assign_parts(sizes, num_parts)
    assert set(owner) == set(sizes)
    filled = [sum(size for name, size in sizes.items() if owner[name] == part) for part in range(num_parts)]
    assert max(filled) - min(filled) <= max(sizes.values(), default=0)
    assert owner == assign_parts(dict(reversed(sizes.items())), num_parts)


def test_equal_tensors_are_spread_evenly() -> None:
    owner = assign_parts({f"t{number}": 10 for number in range(9)}, 3)
    assert sorted(owner.values()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_what_is_saved_is_loaded_whatever_the_number_of_ranks(run: RunRecord, world_size: int) -> None:
    reference = Group(run=run, world_size=world_size).save(4)
    assert run.read().checkpoints == (reference,)
    found = newest_proven(run, token=1)
    assert found is not None
    assert found[0] == reference == CheckpointRef(step=4, token=1, sha256=reference.sha256)
    assert tensors_sha256(found[1]) == tensors_sha256(tensors_of(4))
    base = folder("runs/k/0/", 4, 1)
    assert objects(run) == [base + "manifest.json", *(f"{base}part-{r}.safetensors" for r in range(world_size))]


def test_the_manifest_says_where_everything_is(run: RunRecord) -> None:
    reference = Group(run=run, world_size=3).save(4)
    data = run.store.get_proven(folder("runs/k/0/", 4, 1) + "manifest.json", sha256=reference.sha256)
    manifest = parse(CheckpointManifest, json.loads(data))
    assert (manifest.step, manifest.format) == (4, 1)
    for name, tensor in tensors_of(4).items():
        info = manifest.tensors[name]
        assert (info.dtype, info.shape) == (str(tensor.dtype), tuple(tensor.shape))
        (piece,) = info.slices
        assert (piece.start, piece.shape) == ((0,) * tensor.dim(), tuple(tensor.shape))
    for part in manifest.parts:
        stored = run.store.get(folder("runs/k/0/", 4, 1) + part.name)
        assert (part.sha256, part.num_bytes) == (sha256_hex(stored), len(stored))


def test_the_same_state_has_the_same_bytes_on_the_store(run: RunRecord) -> None:
    group = Group(run=run, world_size=3)
    first = group.save(4)
    before = {key: run.store.get(key) for key in objects(run)}
    assert Group(run=run, world_size=3).save(4) == first
    assert {key: run.store.get(key) for key in objects(run)} == before


def test_the_share_is_copied_at_once(run: RunRecord) -> None:
    """The next step writes into the tensors while they are being saved."""
    go_on = threading.Event()

    def wait_for_the_step() -> None:
        assert go_on.wait(120)

    group = Group(run=run, before_commit=wait_for_the_step)
    tensors = tensors_of(4)
    group.savers[0].save(4, tensors, on_commit=lambda reference: None)
    for tensor in tensors.values():
        tensor.zero_()
    go_on.set()
    group.savers[0].wait()
    found = newest_proven(run, token=1)
    assert found is not None
    assert tensors_sha256(found[1]) == tensors_sha256(tensors_of(4))


@pytest.mark.parametrize("layout", ["transposed", "channels last"])
def test_tensors_of_any_memory_layout_are_saved(run: RunRecord, layout: str) -> None:
    if layout == "transposed":
        tensor = torch.arange(6.0).view(2, 3).t()
    else:
        tensor = torch.arange(48.0).view(2, 3, 2, 4).to(memory_format=torch.channels_last)
    Group(run=run).save(4, {"model.weight": tensor})
    found = newest_proven(run, token=1)
    assert found is not None
    assert torch.equal(found[1]["model.weight"], tensor)


def test_without_any_checkpoint_a_run_begins_at_the_start(run: RunRecord) -> None:
    assert newest_proven(run, token=1) is None


def test_only_what_the_record_names_exists(run: RunRecord) -> None:
    """All objects are there, but the commit did not happen."""

    def fail() -> None:
        raise InfrastructureError("the events could not be flushed")

    with pytest.raises(InfrastructureError):
        Group(run=run, before_commit=fail).save(4)
    assert len(objects(run)) == 2
    assert newest_proven(run, token=1) is None


def test_a_part_that_cannot_be_written_commits_nothing(run: RunRecord, store: Store) -> None:
    faulty = FaultyStore(store, lambda key: "part" in key)
    with pytest.raises(InfrastructureError):
        Group(run=RunRecord(faulty, "k")).save(4)
    assert faulty.num_faults == 1
    assert run.read().checkpoints == ()


def test_rank_0_is_done_once_all_ranks_are_even_if_its_own_part_failed(run: RunRecord, store: Store) -> None:
    """Else it would let the next checkpoint begin, which the others would have to wait for in the midst of training."""
    may_fail = threading.Event()

    class Slow(Store):
        def put_proven(self, key: str, data: bytes | bytearray, *, sha256: str) -> None:
            if "part-1" in key:
                may_fail.wait(120)
            raise InfrastructureError(f"{key}: the test says that the store is away")

    first, second = Group(run=RunRecord(Slow(store.location), "k"), world_size=2).savers
    for saver in (first, second):
        saver.save(4, tensors_of(4), on_commit=lambda reference: None)
    assert not first.is_settled(0.2)
    may_fail.set()
    assert first.is_settled(120)
    for saver, part in ((first, "part-0"), (second, "part-1")):
        with pytest.raises(InfrastructureError, match=part):
            saver.wait()


def test_a_part_that_reads_back_wrong_commits_nothing(run: RunRecord, store: Store) -> None:
    class Corrupting(Store):
        def _put_quickly(self, key: str, pieces: Sequence[Buffer], **_: Any) -> None:
            (data,) = pieces
            self.put(key, bytes(data[:-1]) + bytes([data[-1] ^ 1]) if "part-0" in key else bytes(data))

    with pytest.raises(DamagedError, match="part-0"):
        Group(run=RunRecord(Corrupting(store.location), "k")).save(4)
    assert run.read().checkpoints == ()


def test_an_error_is_raised_once_and_saving_goes_on(run: RunRecord, store: Store) -> None:
    away = [True]
    group = Group(run=RunRecord(FaultyStore(store, lambda key: away[0]), "k"))
    group.savers[0].save(4, tensors_of(4), on_commit=lambda reference: None)
    with pytest.raises(InfrastructureError):
        group.savers[0].wait()
    away[0] = False
    group.save(6)
    assert [c.step for c in run.read().checkpoints] == [6]


# ---- retention -------------------------------------------------------------------------------------------------------


def test_old_checkpoints_leave_the_record_and_the_store(run: RunRecord) -> None:
    group = Group(run=run, world_size=2, keep=2)
    for step in (2, 4, 6, 8):
        group.save(step)
    assert [c.step for c in run.read().checkpoints] == [6, 8]
    assert {key.split("/")[-2] for key in objects(run)} == {"00000006-000001", "00000008-000001"}


def test_those_of_every_so_many_steps_stay_for_ever(run: RunRecord) -> None:
    group = Group(run=run, keep=1, keep_every_steps=4)
    for step in (2, 4, 6, 8, 10):
        group.save(step)
    assert [c.step for c in run.read().checkpoints] == [4, 8, 10]
    assert {key.split("/")[-2] for key in objects(run)} == {f"{step:08d}-000001" for step in (4, 8, 10)}


def test_a_step_committed_again_leaves_nothing_behind(run: RunRecord) -> None:
    Group(run=run, world_size=2).save(4)
    run.update(lambda r: replace(r, token=2))
    Group(run=run, token=2, keep=1).save(4)
    assert [(c.step, c.token) for c in run.read().checkpoints] == [(4, 2)]
    assert {key.split("/")[-2] for key in objects(run)} == {"00000004-000002"}


def test_what_was_begun_and_never_named_goes_with_the_next_commit(run: RunRecord, store: Store) -> None:
    """A group that died while it saved, and a save that failed; not what is quarantined, nor a newer group's."""
    damaged = Group(run=run).save(2)
    run.update(lambda r: with_quarantined(r, damaged, "a reason", token=1))
    unnamed = ["00000009-000001", "00000003-000002", "00000008-000002", "00000001-000003"]
    strange = ["x", "x-y", "1", "1-2-3", "\u0663-1"]
    for name in [*unnamed, *strange]:
        store.put(f"runs/k/0/checkpoints/{name}/part-0.safetensors", b"begun")
    run.update(lambda r: replace(r, token=2))
    Group(run=run, token=2).save(4)
    left = {key.split("/")[-2] for key in objects(run)}
    assert left == {"00000002-000001", "00000004-000002", "00000008-000002", "00000001-000003", *strange}


def test_ranks_that_disagree_commit_nothing(run: RunRecord) -> None:
    group = Group(run=run, world_size=2)
    for rank, saver in enumerate(group.savers):
        agreed = {"norm.count": "same", "seen": f"{rank}"}
        saver.save(4, tensors_of(4), agreed=agreed, on_commit=lambda reference: None)
    group.savers[1].wait()
    with pytest.raises(DeterministicError, match="after step 4 the ranks have different values of buffer seen"):
        group.savers[0].wait()
    assert run.read().checkpoints == ()


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip, truncate, delete])
@pytest.mark.parametrize("name", ["manifest.json", "part-1.safetensors"])
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_is_taken(
    run: RunRecord, damage: Damage, name: str
) -> None:
    group = Group(run=run, world_size=3)
    older, newer = group.save(2), group.save(4)
    damage(run.store, folder("runs/k/0/", 4, 1) + name)
    require_fallback(run, older, newer, name)


def require_fallback(run: RunRecord, older: CheckpointRef, newer: CheckpointRef, name: str) -> None:
    """The newer checkpoint, of step 4, is not believed: the one of step 2 is taken, and the reason kept."""
    found = newest_proven(run, token=1)
    assert found is not None
    assert found[0] == older
    assert tensors_sha256(found[1]) == tensors_sha256(tensors_of(2))
    record = run.read()
    assert record.checkpoints == (older,)
    (quarantined,) = record.quarantined
    assert quarantined.checkpoint == newer
    assert name in quarantined.reason


def flipped_everywhere(good: bytes) -> Iterator[bytes]:
    """One bit flipped in each byte, not the same bit in all."""
    for place in range(len(good)):
        yield good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :]


def of_every_other_length(good: bytes) -> Iterator[bytes]:
    for length in range(len(good)):
        yield good[:length]
    yield good + b"\0"


@pytest.mark.parametrize("name", ["manifest.json", *(f"part-{part}.safetensors" for part in range(3))])
def test_no_damage_to_any_byte_of_any_object_is_ever_loaded(run: RunRecord, name: str) -> None:
    """Every flip, every truncation, every object of either checkpoint in this one's place, and nothing there."""
    group = Group(run=run, world_size=3)
    older, newer = group.save(2), group.save(4)
    whole = {key: run.store.get(key) for key in (run.object_key, *objects(run))}
    key = folder("runs/k/0/", 4, 1) + name
    swapped = [data for other, data in whole.items() if other != key]
    damaged = [*flipped_everywhere(whole[key]), *of_every_other_length(whole[key]), *swapped]
    assert len(damaged) == 2 * len(whole[key]) + 1 + 8
    for data in damaged:
        assert data != whole[key]
        require_fallback(RunRecord(MemoryStore({**whole, key: data}), "k"), older, newer, name)
    del whole[key]
    require_fallback(RunRecord(MemoryStore(whole), "k"), older, newer, name)


def test_when_all_are_damaged_the_run_begins_anew_and_says_why(run: RunRecord) -> None:
    group = Group(run=run)
    for step in (2, 4):
        group.save(step)
        flip(run.store, folder("runs/k/0/", step, 1) + "part-0.safetensors")
    assert newest_proven(run, token=1) is None
    record = run.read()
    assert record.checkpoints == ()
    assert [q.checkpoint.step for q in record.quarantined] == [4, 2]


def test_all_ranks_finding_the_same_damage_quarantine_it_once(run: RunRecord) -> None:
    group = Group(run=run, world_size=3)
    older, newer = group.save(2), group.save(4)
    flip(run.store, folder("runs/k/0/", 4, 1) + "part-1.safetensors")
    reads = threading.Barrier(3)

    class Together(RunRecord):
        """Reads the record at the same moment as the other ranks."""

        waited = False

        def update(self, change: Callable[..., object]) -> object:  # type: ignore[override]
            if not self.waited:
                self.waited = True
                reads.wait(timeout=120)
            return super().update(change)  # type: ignore[arg-type]

    found: list[CheckpointRef] = []

    def resume() -> None:
        taken = newest_proven(Together(run.store, "k"), token=1)
        assert taken is not None
        found.append(taken[0])

    threads = [threading.Thread(target=resume) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [older] * 3
    assert [q.checkpoint for q in run.read().quarantined] == [newer]


def test_a_quarantined_step_can_be_committed_again_under_another_token(run: RunRecord) -> None:
    Group(run=run).save(4)
    flip(run.store, folder("runs/k/0/", 4, 1) + "part-0.safetensors")
    assert newest_proven(run, token=1) is None
    run.update(lambda r: replace(r, token=2))
    again = Group(run=run, token=2).save(4)
    found = newest_proven(run, token=2)
    assert found is not None
    assert found[0] == again


def test_a_store_that_is_away_is_not_damage(run: RunRecord) -> None:
    """A healthy checkpoint must never be struck for an outage."""
    reference = Group(run=run).save(4)

    class Away(Store):
        def get(self, key: str) -> bytes:
            raise InfrastructureError("away")

    away = RunRecord(Away(run.store.location), "k")
    with pytest.raises(InfrastructureError):
        newest_proven(away, token=1)
    assert run.read().checkpoints == (reference,)
    assert run.read().quarantined == ()


def test_a_part_that_holds_other_tensors_than_the_manifest_names_is_damage(run: RunRecord) -> None:
    """Every digest is right, and still the checkpoint is not what it says."""
    reference = Group(run=run).save(4)
    key = folder("runs/k/0/", 4, 1) + "manifest.json"
    document = json.loads(run.store.get(key))
    del document["tensors"]["model.bias"]
    forged = json.dumps(document).encode()
    run.store.put(key, forged)
    with pytest.raises(DamagedError, match="its parts do not hold what its manifest names"):
        load_checkpoint(run.store, "runs/k/0/", replace(reference, sha256=sha256_hex(forged)))


# ---- fencing ---------------------------------------------------------------------------------------------------------


def test_a_zombie_is_refused_although_its_bytes_are_equal(run: RunRecord) -> None:
    zombie = Group(run=run)
    run.update(lambda r: replace(r, token=2))
    current = Group(run=run, token=2).save(4)
    with pytest.raises(FencedError, match="token 1 was replaced by 2"):
        zombie.save(4)
    assert run.read().checkpoints == (current,)
    found = newest_proven(run, token=2)
    assert found is not None
    assert found[0] == current


def test_a_zombie_can_neither_quarantine_nor_drop(run: RunRecord) -> None:
    reference = Group(run=run).save(4)
    flip(run.store, folder("runs/k/0/", 4, 1) + "part-0.safetensors")
    run.update(lambda r: replace(r, token=2))
    with pytest.raises(FencedError):
        newest_proven(run, token=1)
    assert run.read().checkpoints == (reference,)


def test_a_takeover_between_the_parts_and_the_commit_is_seen(run: RunRecord) -> None:

    def take_over() -> None:
        run.update(lambda r: replace(r, token=2))

    with pytest.raises(FencedError):
        Group(run=run, before_commit=take_over).save(4)
    assert run.read().checkpoints == ()


class Remembering(Store):
    """Keeps every document that was ever written by compare-and-set."""

    def __init__(self, store: Store) -> None:
        self.__dict__.update(store.__dict__)
        self.history: list[list[CheckpointRef]] = []

    def replace_versioned(self, key: str, document: dict[str, Any], *, read: Versioned) -> bool:
        done = super().replace_versioned(key, document, read=read)
        if done:
            self.history.append([parse(CheckpointRef, c) for c in document["checkpoints"]])
        return done


@pytest.mark.parametrize("num_races", [3, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_a_zombie_woken_after_the_takeover_commits_nothing_ever(run: RunRecord, num_races: int) -> None:
    """It stopped between its read-back and its commit; its bytes are those that the new owner writes."""
    store = Remembering(run.store)
    for race in range(num_races):
        run.update(lambda r: replace(r, token=r.token + 1, checkpoints=()))
        token = run.read().token
        stopped, go_on = threading.Event(), threading.Event()

        def stop(stopped: threading.Event = stopped, go_on: threading.Event = go_on) -> None:
            stopped.set()
            assert go_on.wait(120)

        zombie = Group(run=RunRecord(store, "k"), token=token, before_commit=stop).savers[0]
        zombie.save(4, tensors_of(race), on_commit=lambda reference: pytest.fail("the zombie committed"))
        assert stopped.wait(120)
        run.update(lambda r: replace(r, token=r.token + 1))
        owner = Group(run=RunRecord(store, "k"), token=token + 1)
        waking = threading.Thread(target=go_on.set)
        waking.start()  # both commit at the same time
        committed = owner.save(4, tensors_of(race))
        waking.join()
        with pytest.raises(FencedError):
            zombie.wait()
        assert run.read().checkpoints == (committed,)
    assert all(c.token % 2 == 1 for checkpoints in store.history for c in checkpoints), "never one of the zombie's"
    assert sum(len(checkpoints) for checkpoints in store.history) >= num_races
    if num_races == 200:
        write_evidence("zombies-refused", rows=[{"races": num_races, "commits_of_zombies": 0}])


def test_torch_distributed_checkpoint_loads_a_flipped_byte_without_a_word(tmp_path: Path) -> None:
    """So that it is known what ours are compared with."""
    weights = {"weight": torch.arange(1000.0)}
    dcp.save(weights, checkpoint_id=tmp_path, no_dist=True)
    (data,) = tmp_path.glob("*.distcp")
    content = bytearray(data.read_bytes())
    place = content.index(torch.tensor(500.0).numpy().tobytes() + torch.tensor(501.0).numpy().tobytes())
    content[place + 2] ^= 1
    data.write_bytes(content)
    found = {"weight": torch.zeros(1000)}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert (found["weight"] != weights["weight"]).sum() == 1
