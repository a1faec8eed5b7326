"""The run record: every writer is fenced, nothing proven is lost, and no concurrent change either."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.unit.tiny import Tiny, stale_preset, tiny_preset
from training.config import LaunchConfig, ParallelConfig
from training.documents import canonical_json, parse
from training.errors import DamagedError, FencedError, MissingError
from training.runs.record import (
    CheckpointRef,
    Continued,
    Departure,
    Failure,
    Member,
    Quarantined,
    Record,
    Result,
    RunRecord,
    _to_json,
    run_key,
    start_fresh,
    with_checkpoint,
    with_environment,
    with_quarantined,
    with_result,
    with_resume_step,
    with_retention,
)
from training.s3.objectstore import Store

RUN = Record(key="k", token=3)


def checkpoint(step: int, token: int = 3) -> CheckpointRef:
    return CheckpointRef(step=step, token=token, sha256=f"{step:064x}")


RESULT = Result(step=9, weights_sha256="w", state_sha256="s", checkpoint=checkpoint(9))

CHANGES: dict[str, Callable[[Record, int], Record]] = {
    "with_environment": lambda record, token: with_environment(record, {"torch": "2"}, token=token),
    "with_checkpoint": lambda record, token: with_checkpoint(record, checkpoint(5, token)),
    "with_quarantined": lambda record, token: with_quarantined(record, checkpoint(5), "why", token=token),
    "with_retention": lambda record, token: with_retention(record, token=token, keep=1),
    "with_resume_step": lambda record, token: with_resume_step(record, 5, token=token),
    "with_result": lambda record, token: with_result(record, RESULT, token=token),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_old_or_unknown_token_is_refused(name: str) -> None:
    for token in (0, 2, 4):
        with pytest.raises(FencedError, match=f"token {token} was replaced by 3"):
            CHANGES[name](RUN, token)


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("with_retention", "with_quarantined")])
def test_the_current_token_is_let_through(name: str) -> None:
    assert CHANGES[name](RUN, 3) != RUN


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_applied_twice_is_applied_once(name: str) -> None:
    """Every rank may apply it, and a lost race applies it anew."""
    once = CHANGES[name](replace(RUN, checkpoints=(checkpoint(4), checkpoint(5))), 3)
    assert CHANGES[name](once, 3) == once


def test_the_environment_of_the_first_stays() -> None:
    first = with_environment(RUN, {"torch": "2"}, token=3)
    assert with_environment(first, {"torch": "3"}, token=3).environment == {"torch": "2"}


def test_checkpoints_are_ordered_and_one_per_step() -> None:
    record = RUN
    for step in (4, 2, 6, 2):
        record = with_checkpoint(record, checkpoint(step))
    assert [c.step for c in record.checkpoints] == [2, 4, 6]


def test_a_step_committed_again_names_the_newer_token() -> None:
    record = with_checkpoint(RUN, checkpoint(4))
    record = with_checkpoint(replace(record, token=4), checkpoint(4, token=4))
    assert record.checkpoints == (checkpoint(4, token=4),)


@pytest.mark.parametrize(
    ("keep", "kept"), [(0, [6]), (-5, [6]), (1, [6]), (2, [4, 6]), (3, [2, 4, 6]), (99, [2, 4, 6])]
)
def test_retention_keeps_the_newest_and_never_drops_the_last(keep: int, kept: list[int]) -> None:
    record = replace(RUN, checkpoints=tuple(checkpoint(step) for step in (2, 4, 6)))
    assert [c.step for c in with_retention(record, token=3, keep=keep).checkpoints] == kept


def test_retention_of_nothing() -> None:
    assert with_retention(RUN, token=3, keep=1).checkpoints == ()


def test_a_quarantined_checkpoint_is_struck_and_its_step_can_be_committed_again() -> None:
    record = replace(RUN, checkpoints=(checkpoint(2), checkpoint(4)))
    record = with_quarantined(record, checkpoint(4), "flipped", token=3)
    assert record.checkpoints == (checkpoint(2),)
    assert record.quarantined == (Quarantined(checkpoint=checkpoint(4), reason="flipped"),)
    record = with_checkpoint(replace(record, token=4), checkpoint(4, token=4))
    assert record.checkpoints == (checkpoint(2), checkpoint(4, token=4))


def test_resume_steps_line_up_with_tokens() -> None:
    record = with_resume_step(Record(key="k", token=1), 0, token=1)
    record = with_resume_step(replace(record, token=2), 50, token=2)
    assert record.resume_steps == (0, 50)
    assert with_resume_step(record, 40, token=2).resume_steps == (0, 40)
    later = with_resume_step(replace(record, token=5), 100, token=5)
    assert len(later.resume_steps) == 5
    assert (later.resume_steps[0], later.resume_steps[1], later.resume_steps[4]) == (0, 50, 100)


def test_a_result_ends_a_failure() -> None:
    failed = replace(RUN, failure=Failure(kind="UserError", message="x", records=("r",)))
    record = with_result(failed, RESULT, token=3)
    assert (record.result, record.failure) == (RESULT, None)


def test_a_fresh_generation_holds_nothing_and_fences_the_old_one_off() -> None:
    old = with_result(replace(RUN, generation=1, checkpoints=(checkpoint(9),), tracking_run_id="t"), RESULT, token=3)
    new = start_fresh(old)
    assert new == Record(key="k", generation=2, token=4)
    with pytest.raises(FencedError):
        with_checkpoint(new, checkpoint(9))


FULL = Record(
    key="k",
    instance="i",
    secret="s",
    generation=1,
    fresh_mark="m",
    token=2,
    members=(Member(node=0, incarnation="i", address="127.0.0.1", port=1),),
    num_nodes=1,
    signs_of_life=1,
    resume_steps=(0, 5),
    checkpoints=(checkpoint(5, token=1),),
    quarantined=(Quarantined(checkpoint=checkpoint(7, token=1), reason="r"),),
    departures=(Departure(token=1, node=0, cause="c", step=6, class_name="Killed", records=("r",)),),
    forgiven_token=1,
    environment={"torch": "2"},
    tracking_run_id="t",
    continued=Continued(run_key="o", generation=0, step=5),
    result=RESULT,
    failure=Failure(kind="UserError", message="x", records=("r",)),
)


def test_a_full_record_round_trips() -> None:
    assert parse(Record, {"format": 1, "nonce": "n", "version": 3, **asdict(FULL)}) == FULL


def test_the_stored_form_is_golden() -> None:
    """Runs that are under way must be readable by the next release: if this fails, raise FORMAT."""
    golden = Path(__file__).parents[1] / "golden" / "record-format-1.json"
    assert canonical_json(_to_json(FULL)) == golden.read_bytes()


def test_a_record_from_before_agents_spoke_to_one_another_can_be_read() -> None:
    document = {key: value for key, value in asdict(FULL).items() if key not in ("secret", "signs_of_life")}
    assert parse(Record, document) == replace(FULL, secret="", signs_of_life=0)


# ---- on the store ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(store: Store) -> RunRecord:
    return RunRecord(store, "key")


def test_a_record_is_made_once(run: RunRecord) -> None:
    assert run.find() is None
    with pytest.raises(MissingError):
        run.read()
    made = run.create_if_missing()
    assert made == Record(key="key", instance=made.instance, secret=made.secret)
    assert made.instance
    assert len(made.secret) == 64
    run.update(lambda record: replace(record, token=7))
    assert run.create_if_missing().token == 7


def test_an_unchanged_record_is_not_written(run: RunRecord, store: Store) -> None:
    run.create_if_missing()
    before = store.read_versioned(run.object_key)
    run.update(lambda record: record)
    assert store.read_versioned(run.object_key) == before


def test_a_change_that_refuses_writes_nothing(run: RunRecord, store: Store) -> None:
    run.create_if_missing()
    before = store.read_versioned(run.object_key)
    with pytest.raises(FencedError):
        run.update(lambda record: with_resume_step(record, 5, token=9))
    assert store.read_versioned(run.object_key) == before


def test_no_concurrent_change_is_lost(run: RunRecord) -> None:
    run.create_if_missing()
    num_threads, num_changes = 6, 4
    barrier = threading.Barrier(num_threads)

    def change_often(node: int) -> None:
        barrier.wait(timeout=120)
        for step in range(num_changes):
            mine = Departure(token=1, node=node, cause="c", step=step, class_name="Killed")
            run.update(lambda r, d=mine: replace(r, token=r.token + 1, departures=(*r.departures, d)))  # type: ignore[misc]

    threads = [threading.Thread(target=change_often, args=(node,)) for node in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = run.read()
    assert record.token == num_threads * num_changes
    assert len(set(record.departures)) == len(record.departures) == num_threads * num_changes


def test_generations_have_folders_of_their_own(run: RunRecord) -> None:
    assert run.prefix(Record(key="key")) == "runs/key/0/"
    assert run.prefix(Record(key="key", generation=2)) == "runs/key/2/"


# ---- the run key -----------------------------------------------------------------------------------------------------


def test_the_run_key_is_a_function_of_what_decides_the_result() -> None:
    def key(*, recipe: Tiny | None = None, dataset: str = "d", weights: str | None = None, **train: int) -> str:
        preset = tiny_preset(**train)
        return run_key(recipe=recipe or Tiny(), preset=preset, dataset_digest=dataset, initial_weights=weights)

    base = key()
    assert len(base) == len(hashlib.sha256().hexdigest())
    assert key() == base
    assert key(checkpoint_every_steps=3, keep_checkpoints=1) == base
    others = [key(recipe=Tiny(scale=2.0)), key(dataset="e"), key(weights="w"), key(steps=7), key(batch_size=25)]
    assert len({base, *others}) == 6


def test_a_bound_of_staleness_is_part_of_the_run_key_and_servers_are_not() -> None:
    keys = [
        run_key(recipe=Tiny(), preset=preset, dataset_digest="d")
        for preset in (tiny_preset(), stale_preset(staleness=0), stale_preset(staleness=1), stale_preset(staleness=2))
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert "staleness" not in stale_preset(staleness=0).determining()["train"]


def test_over_which_ranks_a_model_is_spread_is_no_part_of_the_run_key() -> None:
    preset = tiny_preset()
    sharded = replace(preset, launch=replace(preset.launch, nodes=2), parallel=ParallelConfig(shard=2))
    pipelined = replace(sharded, parallel=ParallelConfig(pipeline=2, schedule="gpipe"))
    assert len({run_key(recipe=Tiny(), preset=each, dataset_digest="d") for each in (preset, sharded, pipelined)}) == 1


def test_into_how_many_parts_matrices_are_cut_is_part_of_the_run_key() -> None:
    preset = replace(tiny_preset(), launch=LaunchConfig(nodes=4))
    parts = [
        ParallelConfig(),
        ParallelConfig(sequences="whole"),
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, sequences="whole"),
        ParallelConfig(tensor=4),
    ]
    presets = [replace(preset, parallel=each) for each in parts]
    keys = [run_key(recipe=Tiny(), preset=each, dataset_digest="d") for each in presets]
    assert (keys[0], len(set(keys))) == (keys[1], 4)
    assert "parallel" not in preset.determining()


def test_a_default_and_the_same_value_written_out_are_one_run() -> None:
    preset = tiny_preset()
    written_out = replace(preset, hyperparameters={"scale": 1.0})
    keys = {run_key(recipe=Tiny(), preset=p, dataset_digest="d") for p in (preset, written_out)}
    assert len(keys) == 1


def test_a_damaged_record_is_named(store: Store) -> None:
    run = RunRecord(store, "k")
    run.create_if_missing()
    store.put(run.object_key, store.get(run.object_key).replace(b'"key"', b'"kez"'))
    for use in (run.read, lambda: run.update(lambda record: record)):
        with pytest.raises(DamagedError, match=r"runs/k/record\.json is damaged"):
            use()
