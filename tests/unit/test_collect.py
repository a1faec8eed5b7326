"""Garbage goes, and nothing that a version names; versions are found, compared, proven, and lose withdrawn records."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_source import data_config, local_source, write_csv, write_files
from tests.unit.reading import make_reader
from tests.unit.test_stream import flip
from tests.unit.tiny import Tiny, tiny_preset
from tests.waiting import wait_until
from training.data.activity import activity_key, distrust, read_activity
from training.data.collect import collect
from training.data.finished import Finished
from training.data.lease import writing
from training.data.manifest import SPLITS, Manifest, load_manifest, manifest_key, shard_key
from training.data.versions import compare, find_version, remove_version, verify_version, versions
from training.data.withdraw import withdraw
from training.data.withdrawn import Withdrawn, quarantined_records, record_of, withdrawn_key, withdrawn_records
from training.data.writer import PartResult, Writer, write_dataset
from training.documents import sealed
from training.errors import DamagedError, InfrastructureError, UserError
from training.runs.job import Job, store_job
from training.runs.record import RunRecord
from training.s3.objectstore import Entry, Store

CONFIG = data_config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path, num_files=3)
    return tmp_path


def write(store: Store, folder: Path, withdrawn: Withdrawn | None = None) -> Manifest:
    source = local_source(folder, CONFIG)
    return write_dataset(store, source, CONFIG, Tiny(), withdrawn=withdrawn or {}).manifest


def shards(store: Store) -> set[str]:
    return {key for key, _ in store.list_keys("datasets/tiny/shards/")}


def named_by(*manifests: Manifest) -> set[str]:
    return {shard_key("tiny", shard.sha256) for m in manifests for split in SPLITS for shard in m.splits[split]}


# ---- garbage ---------------------------------------------------------------------------------------------------------


def test_only_what_no_version_names_is_deleted(store: Store, folder: Path) -> None:
    first = write(store, folder)
    write_csv(folder / "raw/2.csv", range(900, 960))
    second = write(store, folder)
    store.put("datasets/tiny/shards/stray", b"left by a writer that died")
    assert collect(store, "tiny", older_than_hours=0).keys == ("datasets/tiny/shards/stray",)
    assert shards(store) == named_by(first, second)
    remove_version(store, "tiny", first.digest)
    garbage = collect(store, "tiny", older_than_hours=0, dry_run=True)
    assert set(garbage.keys) >= named_by(first) - named_by(second)
    assert shards(store) == named_by(first, second), "a dry run deletes nothing"
    assert collect(store, "tiny", older_than_hours=0) == garbage
    assert shards(store) == named_by(second)
    assert len([key for key in garbage.keys if "/parts/" in key]) == 1
    assert write(store, folder) == second


def test_results_of_what_is_gone_are_deleted(store: Store, folder: Path) -> None:
    """And none that a stage may still find: of a version that is there, of a run with a record; nor a damaged one."""
    manifest = write(store, folder)
    store.put("datasets/tiny/results/old.json", sealed("result", {"digest": "0" * 64}))
    store.put("runs/removed/results/a.json", sealed("result", {}))
    RunRecord(store, "living").create_if_missing()
    kept = ["datasets/tiny/results/new.json", "datasets/tiny/results/damaged.json", "runs/living/results/a.json"]
    for key in kept:
        store.put(key, b"{}" if "damaged" in key else sealed("result", {"digest": manifest.digest}))
    store.put("runs/removed/0/follower.json", b"{}")
    gone = collect(store, "tiny", older_than_hours=0)
    assert gone.keys == ("datasets/tiny/results/old.json", "runs/removed/results/a.json")
    assert not any(store.exists(key) for key in gone.keys)
    assert all(store.exists(key) for key in kept)


def test_result_of_a_run_that_is_begun_while_garbage_is_looked_for_is_kept(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, folder)
    store.put("runs/k/results/a.json", sealed("result", {}))
    list_entries = Store.list_entries

    def begin_and_list(self: Store, prefix: str) -> Iterator[Entry]:
        if prefix.startswith("runs/"):
            RunRecord(store, "k").create_if_missing()
        return list_entries(self, prefix)

    monkeypatch.setattr(Store, "list_entries", begin_and_list)
    assert collect(store, "tiny", older_than_hours=0).keys == ()


def test_unfinished_work_is_kept_for_a_while(store: Store, folder: Path) -> None:
    write(store, folder)
    store.put("datasets/tiny/shards/stray", b"")
    store.put("datasets/tiny/results/old.json", sealed("result", {"digest": "0" * 64}))
    store.put("runs/removed/results/a.json", sealed("result", {}))
    assert collect(store, "tiny").keys == ()


def test_a_dry_run_disturbs_no_writer(store: Store, folder: Path) -> None:
    remove_version(store, "tiny", write(store, folder).digest)
    with writing(store, "tiny"):
        assert set(collect(store, "tiny", older_than_hours=0, dry_run=True).keys) >= shards(store)


def test_a_damaged_manifest_stops_the_collection(store: Store, folder: Path) -> None:
    """What it names is not known: nothing may be taken for garbage."""
    manifest = write(store, folder)
    store.put(manifest_key("tiny", manifest.digest), b"{}")
    with pytest.raises(DamagedError, match=manifest.digest):
        collect(store, "tiny", older_than_hours=0)
    assert shards(store) == named_by(manifest)


def test_damaged_receipt_is_left_alone(store: Store, folder: Path) -> None:
    write(store, folder)
    store.put("datasets/tiny/parts/x.json", b"{")
    assert collect(store, "tiny", older_than_hours=0).keys == ()


def test_collector_waits_for_a_writer_between_its_shards_and_its_manifest(store: Store, folder: Path) -> None:
    """The writer found an old shard that nobody names, and relies on it."""
    old = write(store, folder)
    remove_version(store, "tiny", old.digest)
    writer = Writer(store, local_source(folder, CONFIG), CONFIG, Tiny())
    with writing(store, "tiny") as lease:
        results = [writer.write(part) for part in writer.parts]
        assert sum(result.num_shards_sent for result in results) == 0
        with pytest.raises(UserError, match=rf"a writer is at work \(process {os.getpid()} on .+\); try again when"):
            collect(store, "tiny", older_than_hours=0)
        made = writer.finish(results, lease).manifest
    assert made == old
    assert collect(store, "tiny", older_than_hours=0).keys == ()
    assert shards(store) == named_by(old)


def test_writer_that_slept_through_a_collection_makes_no_manifest(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write(store, folder)
    remove_version(store, "tiny", old.digest)
    monkeypatch.setattr("training.data.lease.Lease._renew_for_ever", lambda self: None)
    writer = Writer(store, local_source(folder, CONFIG), CONFIG, Tiny())
    with writing(store, "tiny", seconds=0.0) as lease:
        results: list[PartResult] = [writer.write(part) for part in writer.parts]
        collect(store, "tiny", older_than_hours=0)
        store.put(results[0].key, store.get(results[0].key)) if store.exists(results[0].key) else None
        with pytest.raises((InfrastructureError, UserError)):
            writer.finish(results, lease)
    assert versions(store, "tiny") == []
    assert write(store, folder) == old, "run again, it makes what is missing"
    assert shards(store) == named_by(old)


@pytest.mark.parametrize("seed", range(3))
def test_every_version_is_whole_after_any_sequence(store: Store, folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(8):
        known = versions(store, "tiny")
        action = chance.choice(["append", "write", "gc", "rm", "withdraw"])
        if action == "append":
            write_csv(folder / f"raw/{chance.randrange(3)}.csv", range(chance.randrange(40, 90)))
        if action in ("append", "write") or not known:
            write(store, folder, withdrawn_records(store, "tiny"))
        elif action == "gc":
            collect(store, "tiny", older_than_hours=0)
        elif action == "rm":
            remove_version(store, "tiny", chance.choice(known))
        else:
            manifest = load_manifest(store, "tiny", known[-1])
            reader = make_reader(store, "tiny", manifest, "train")
            withdraw(store, "tiny", known[-1], [reader.read([0]).ids[0].removesuffix("#0")])
        for digest in versions(store, "tiny"):
            assert named_by(load_manifest(store, "tiny", digest)) <= shards(store), action


# ---- versions --------------------------------------------------------------------------------------------------------


def test_version_is_found_by_name_by_digest_and_by_both(store: Store, folder: Path) -> None:
    first = write(store, folder)
    (entry,) = store.list_entries("datasets/tiny/manifests/")
    wait_until(lambda: time.time() > entry.modified.timestamp() + 1, what="the next second: stores tell no more")
    write_csv(folder / "raw/2.csv", range(900, 960))
    second = write(store, folder)
    assert find_version(store, "tiny") == ("tiny", second.digest), "the newest"
    for text in (first.digest, first.digest[:9], f"tiny@{first.digest[:9]}"):
        assert find_version(store, text) == ("tiny", first.digest)
    for text in ("", "nothing", "tiny@ff00", "other@"):
        with pytest.raises(UserError, match=r"no dataset version is meant|name a dataset"):
            find_version(store, text)


def test_difference_counts_shards_bytes_and_samples(store: Store, folder: Path) -> None:
    first = write(store, folder)
    with (folder / "raw/2.csv").open("a") as file:
        file.writelines(f"1,2,3,4,{number},1\n" for number in range(7000, 7010))
    second = write(store, folder)
    rows = list(compare(store, ("tiny", first), ("tiny", second)))
    assert sum(row.samples_only_b for row in rows) == 10
    assert sum(row.samples_only_a for row in rows) == 0
    assert sum(row.shards_shared for row in rows) == len(named_by(first) & named_by(second))
    assert all(row.bytes_only_b >= row.bytes_only_a for row in rows)


def test_difference_counts_samples_whose_content_changed_under_their_id(store: Store, folder: Path) -> None:
    first = write(store, folder)
    lines = (folder / "raw/2.csv").read_text().splitlines()
    (folder / "raw/2.csv").write_text("\n".join([*lines[:4], lines[4].replace(",", ",1", 1), *lines[5:]]))
    rows = list(compare(store, ("tiny", first), ("tiny", write(store, folder))))
    both = [(row.samples_changed, row.samples_only_a, row.samples_only_b) for row in rows]
    assert sorted(both) in ([(0, 0, 0), (1, 0, 0)], [(0, 0, 1), (0, 1, 0)]), "or it has moved to the other split"


def test_a_version_that_a_run_was_trained_on_is_not_removed(store: Store, folder: Path) -> None:
    manifest = write(store, folder)
    store_job(
        store, Job(key="k", generation=0, preset=tiny_preset(), dataset_digest=manifest.digest, location=store.location)
    )
    with pytest.raises(UserError, match=r"was used by run k: remove the run first"):
        remove_version(store, "tiny", manifest.digest)
    assert versions(store, "tiny") == [manifest.digest]


def test_runs_are_looked_for_while_the_version_is_claimed(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write(store, folder)
    seen: list[str] = []

    def look(store: Store, digests: object) -> tuple[str, ...]:
        seen.extend(read_activity(store, "tiny").holders)
        return ()

    monkeypatch.setattr("training.data.versions.runs_that_used", look)
    remove_version(store, "tiny", manifest.digest)
    assert [name.partition("-")[0] for name in seen] == ["writer"]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "swapped"])
def test_verify_names_each_bad_shard(store: Store, folder: Path, damage: str) -> None:
    manifest = write(store, folder)
    keys = sorted(named_by(manifest))
    assert [found for found in verify_version(store, "tiny", manifest.digest) if found] == []
    good = store.get(keys[3])
    if damage == "missing":
        store.delete(keys[3])
    else:
        store.put(keys[3], {"flipped": flip(good, 50), "truncated": good[:-1], "swapped": store.get(keys[4])}[damage])
    (found,) = [found for found in verify_version(store, "tiny", manifest.digest) if found]
    assert (found.key, found.reason) == (keys[3], "missing" if damage == "missing" else "damaged")


# ---- withdrawing -----------------------------------------------------------------------------------------------------


def all_ids(store: Store, manifest: Manifest) -> set[str]:
    readers = [make_reader(store, "tiny", manifest, split) for split in SPLITS]
    return {sample_id for reader in readers for sample_id in reader.read(range(len(reader))).ids}


def test_withdrawn_records_are_gone_and_the_rest_is_shared(store: Store, folder: Path) -> None:
    first = write(store, folder)
    job = Job(key="k", generation=0, preset=tiny_preset(), dataset_digest=first.digest, location=store.location)
    store_job(store, job)
    store_job(store, replace(job, key="other", dataset_digest="0" * 64))
    train = make_reader(store, "tiny", first, "train").read([0, 1]).ids
    ids = [sample_id.removesuffix("#0") for sample_id in train]
    done = withdraw(store, "tiny", first.digest, ids)
    second = load_manifest(store, "tiny", done.new_digest)
    assert all_ids(store, first) - all_ids(store, second) == set(train)
    assert (done.num_samples_removed, done.num_shards_rewritten) == (2, 1)
    assert done.num_shards_shared == len(named_by(first) & named_by(second)) == len(named_by(first)) - 1
    assert done.runs_that_used_them == ("k",)
    assert set(withdrawn_records(store, "tiny")) == set(ids)
    again = write(store, folder, withdrawn_records(store, "tiny"))
    assert all_ids(store, again) == all_ids(store, second), "sharding the source again leaves them out too"


def test_what_was_withdrawn_stays_out_wherever_its_line_is_by_now(store: Store, folder: Path) -> None:
    first = write(store, folder)
    sample_id = make_reader(store, "tiny", first, "train").read([0]).ids[0]
    file, _, line = record_of(sample_id).rpartition(":")
    withdraw(store, "tiny", first.digest, [record_of(sample_id)])
    source = folder / "raw" / file
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("9,9,9,9,9,1\n" + "".join(lines))
    written = write_dataset(
        store, local_source(folder, CONFIG), CONFIG, Tiny(), withdrawn=withdrawn_records(store, "tiny")
    )
    assert f"{file}:{int(line) + 1}#0" not in all_ids(store, written.manifest), "the withdrawn one, a line further down"
    assert written.displaced == (record_of(sample_id),), "the line that is there now is left out too, and told"
    lines[int(line) - 1] = "\n"
    source.write_text("".join(lines))
    written = write_dataset(
        store, local_source(folder, CONFIG), CONFIG, Tiny(), withdrawn=withdrawn_records(store, "tiny")
    )
    assert written.displaced == (), "an empty line in its place moves nothing"
    assert all_ids(store, written.manifest) == all_ids(store, first) - {sample_id}


def test_what_was_sharded_last_is_the_newest_within_one_second_too(store: Store, folder: Path) -> None:
    first = write(store, folder)
    digests = [first.digest]
    for record in ("0.csv:1", "0.csv:2", "0.csv:3"):
        digests.append(withdraw(store, "tiny", digests[-1], [record]).new_digest)
        assert find_version(store, "tiny") == ("tiny", digests[-1])
    assert versions(store, "tiny")[-1] == digests[-1]


def test_what_was_sharded_last_is_the_newest_whatever_the_times_say(store: Store, folder: Path) -> None:
    first = write(store, folder)
    second = withdraw(store, "tiny", first.digest, ["0.csv:1"]).new_digest
    (last,) = [e for e in store.list_entries("datasets/tiny/manifests/") if second in e.key]
    wait_until(lambda: time.time() > last.modified.timestamp() + 1, what="the next second: stores tell no more")
    store.put(manifest_key("tiny", first.digest), first.to_bytes())  # as copying a bucket does
    assert find_version(store, "tiny") == ("tiny", second)
    remove_version(store, "tiny", second)
    assert find_version(store, "tiny") == ("tiny", first.digest)


def test_strange_objects_beside_the_manifests_are_no_versions(store: Store, folder: Path) -> None:
    first = write(store, folder)
    for name in ("README.txt", "notes.json", first.digest, f"old/{first.digest}.json", f"{first.digest}.json.bak"):
        store.put(f"datasets/tiny/manifests/{name}", b"not one of ours")
    assert versions(store, "tiny") == [first.digest]
    assert find_version(store, "tiny") == ("tiny", first.digest)
    assert collect(store, "tiny", older_than_hours=0).keys == ()


ACTIVITY_DAMAGE = {
    "no_json": b"{",
    "no_text": b"\xff",
    "a_list": b"[]",
    "other_format": b'{"format": 2}',
    "other_shape": b'{"format": 1, "holders": 7}',
    "no_count": b'{"format": 1, "version": "x"}',
}


@pytest.mark.parametrize("damage", ACTIVITY_DAMAGE)
def test_a_damaged_activity_document_is_named_with_its_cure(store: Store, folder: Path, damage: str) -> None:
    first = write(store, folder)
    store.put(activity_key("tiny"), ACTIVITY_DAMAGE[damage])
    cure = r"datasets/tiny/activity\.json is damaged.* on dataset 'tiny', delete that object; it is made anew"
    for work in (lambda: write(store, folder), lambda: collect(store, "tiny"), lambda: distrust(store, "tiny")):
        with pytest.raises(DamagedError, match=cure):
            work()
    assert find_version(store, "tiny") == ("tiny", first.digest), "who only looks is not stopped"
    store.delete(activity_key("tiny"))
    assert write(store, folder) == first


def test_what_was_remembered_does_not_count_after_the_activity_document_was_lost(store: Store, folder: Path) -> None:
    assert read_activity(store, "tiny").generation == 0
    first = write(store, folder)
    generations = {read_activity(store, "tiny").generation}
    assert generations == {0}, "as it was read before there was a document"
    remove_version(store, "tiny", withdraw(store, "tiny", first.digest, ["0.csv:1"]).new_digest)
    generations.add(read_activity(store, "tiny").generation)
    store.delete(activity_key("tiny"))
    anew = read_activity(store, "tiny").generation
    assert anew not in generations
    with writing(store, "tiny"):
        assert read_activity(store, "tiny").generation == anew, "or what the next run does is never remembered"


def equal_lines(folder: Path) -> None:
    """One line that two files hold, at other places."""
    for name, number in (("a", 1), ("b", 40)):
        lines = [f"{n},{name == 'a':d},1,1,1,1\n" for n in range(60)]
        lines[number - 1] = "7,7,7,7,7,2\n"
        (folder / f"raw/{name}.csv").write_text("".join(lines))


def sharded(store: Store, folder: Path) -> Manifest:
    return write(store, folder, withdrawn_records(store, "tiny"))


def test_equal_records_go_together_whatever_was_sharded_before(store: Store, folder: Path, tmp_path: Path) -> None:
    equal_lines(folder)
    first = write(store, folder)
    done = withdraw(store, "tiny", first.digest, ["a.csv:1"])
    assert done.num_samples_removed == 2
    again = sharded(store, folder)
    assert again.digest == done.new_digest or all_ids(store, again) == all_ids(
        store, load_manifest(store, "tiny", done.new_digest)
    )
    elsewhere = Store(replace(store.location, prefix=store.location.prefix + "elsewhere/"))
    known = withdrawn_records(store, "tiny")
    fresh = write_dataset(elsewhere, local_source(folder, CONFIG), CONFIG, Tiny(), withdrawn=known).manifest
    assert fresh.digest == again.digest, "the same source and the same list give the same version"


def test_what_is_withdrawn_does_not_come_back_under_the_name_that_its_file_had_before(
    store: Store, folder: Path
) -> None:
    first = write(store, folder)
    (folder / "raw/0.csv").rename(folder / "raw/new.csv")
    second = write(store, folder)
    done = withdraw(store, "tiny", second.digest, ["new.csv:1"])
    assert first.digest in done.versions_that_hold_them, "although it has another id there"
    (folder / "raw/new.csv").rename(folder / "raw/0.csv")
    assert "0.csv:1#0" not in all_ids(store, sharded(store, folder))


def test_a_second_withdrawal_from_an_old_version_does_not_bring_the_first_back(store: Store, folder: Path) -> None:
    first = write(store, folder)
    withdraw(store, "tiny", first.digest, ["0.csv:1"])
    done = withdraw(store, "tiny", first.digest, ["0.csv:2"])
    gone = all_ids(store, first) - all_ids(store, load_manifest(store, "tiny", done.new_digest))
    assert gone == {"0.csv:1#0", "0.csv:2#0"}


def test_what_two_versions_hold_under_one_id_may_both_be_withdrawn(store: Store, folder: Path) -> None:
    first = write(store, folder)
    source = folder / "raw/0.csv"
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(["8,8,8,8,8,1\n", *lines[1:]]))
    second = write(store, folder)
    withdraw(store, "tiny", first.digest, ["0.csv:1"])
    withdraw(store, "tiny", second.digest, ["0.csv:1"])
    source.write_text("".join(["9,9,9,9,9,1\n", lines[0], "8,8,8,8,8,1\n", *lines[1:]]))
    held = all_ids(store, sharded(store, folder))
    assert not held & {"0.csv:2#0", "0.csv:3#0"}


def test_a_withdrawal_names_every_version_that_holds_the_record_and_its_runs(store: Store, folder: Path) -> None:
    """The record was appended to other ones since the run was trained, and its shard is another one now."""
    first = write(store, folder)
    store_job(
        store, Job(key="k", generation=0, preset=tiny_preset(), dataset_digest=first.digest, location=store.location)
    )
    reader = make_reader(store, "tiny", first, "train")
    record = reader.read([len(reader) - 1]).ids[0]
    with (folder / "raw/2.csv").open("a") as file:
        file.writelines(f"1,2,3,4,{number},1\n" for number in range(7000, 7010))
    second = write(store, folder)
    before = time.time()
    done = withdraw(store, "tiny", second.digest, [record_of(record)], reason="asked")
    assert set(done.versions_that_hold_them) == set(done.versions_that_train_on_them) == {first.digest, second.digest}
    assert done.runs_that_used_them == ("k",)
    (noted,) = store.read_versioned(withdrawn_key("tiny")).document["ids"].values()
    assert noted["reason"] == "asked"
    assert before - 1 < datetime.fromisoformat(noted["time"]).timestamp() <= time.time()
    again = withdraw(store, "tiny", first.digest, [record_of(record)], reason="again")
    assert done.new_digest not in again.versions_that_hold_them
    assert store.read_versioned(withdrawn_key("tiny")).document["ids"] == {record_of(record): noted}


def test_records_of_the_test_split_made_no_model(store: Store, folder: Path) -> None:
    first = write(store, folder)
    store_job(
        store, Job(key="k", generation=0, preset=tiny_preset(), dataset_digest=first.digest, location=store.location)
    )
    sample = make_reader(store, "tiny", first, "test").read([0]).ids[0]
    assert withdraw(store, "tiny", first.digest, [sample.removesuffix("#0")]).runs_that_used_them == ()


def test_an_unknown_record_is_named_before_anything_is_written(store: Store, folder: Path) -> None:
    first = write(store, folder)
    before = sorted(store.list_keys("datasets/tiny/shards/"))
    with pytest.raises(UserError, match=r"holds no record '9\.csv:1'"):
        withdraw(store, "tiny", first.digest, ["0.csv:1", "9.csv:1"])
    assert withdrawn_records(store, "tiny") == {}
    assert (sorted(store.list_keys("datasets/tiny/shards/")), versions(store, "tiny")) == (before, [first.digest])


def test_a_withdrawal_that_was_done_is_told_again(store: Store, folder: Path) -> None:
    """MLflow may have been away when it was; and it makes no version, which would be the newest then."""
    first = write(store, folder)
    (sample,) = make_reader(store, "tiny", first, "train").read([0]).ids
    record = sample.removesuffix("#0")
    name, _, number = record.partition(":")
    lines = (folder / "raw" / name).read_text().splitlines(keepends=True)
    (folder / "raw/moved.csv").write_text(lines.pop(int(number) - 1))
    (folder / "raw" / name).write_text("".join(lines))
    moved = write(store, folder)
    done = withdraw(store, "tiny", first.digest, [record])
    assert set(done.versions_that_hold_them) == {first.digest, moved.digest}
    found = versions(store, "tiny")
    again = withdraw(store, "tiny", done.new_digest, [record])
    assert (again.new_digest, again.num_samples_removed) == (done.new_digest, 0)
    assert again.versions_that_train_on_them == done.versions_that_train_on_them
    assert versions(store, "tiny") == found
    with pytest.raises(UserError, match=r"holds no record '.*#0': a record's id is"):
        withdraw(store, "tiny", done.new_digest, [sample])


def test_a_split_is_not_emptied(store: Store, folder: Path) -> None:
    first = write(store, folder)
    reader = make_reader(store, "tiny", first, "test")
    everything = [sample_id.removesuffix("#0") for sample_id in reader.read(range(len(reader))).ids]
    with pytest.raises(UserError, match="no sample in its test split"):
        withdraw(store, "tiny", first.digest, everything)
    assert withdrawn_records(store, "tiny") == {}


@pytest.mark.parametrize(
    "ids", [[], {"a": 3}, {"a": {}}, {"a": {"contents": "abc"}}, {"a": {"contents": [], "reason": 3}}]
)
def test_a_list_of_withdrawn_records_that_is_none_is_named(store: Store, ids: Any) -> None:
    store.create_versioned(withdrawn_key("tiny"), {"format": 1, "ids": ids})
    for read in (withdrawn_records, quarantined_records):
        with pytest.raises(DamagedError, match=r"withdrawn\.json lists no withdrawn records"):
            read(store, "tiny")


@pytest.mark.parametrize("splits", [{}, {"train": []}, {"test": []}])
def test_a_receipt_without_a_split_is_not_believed(store: Store, splits: dict[str, list[str]]) -> None:
    store.put(shard_key("d", "some"), b"a shard")
    store.put("receipt", sealed("receipt", {"fields": {}, "splits": splits}))
    assert Finished(store, "d", withdrawn_contents=()).maybe_receipt("receipt") is None


@pytest.mark.parametrize("lapses", ["nan", "inf", -1, 1e300])
def test_a_claim_that_lapses_at_no_time_is_damage(store: Store, lapses: Any) -> None:
    store.create_versioned(activity_key("d"), {"format": 1, "holders": {"writer-a": lapses}})
    with pytest.raises(DamagedError, match=r"activity\.json is damaged .*holders"):
        read_activity(store, "d")
