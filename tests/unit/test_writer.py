"""Sharding on a real store: one digest for one input, nothing sent twice, and damage repaired by a rerun."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data_source import data_config, local_source, tiny_line, write_csv, write_files
from tests.unit.fakes import FaultyStore
from tests.unit.reading import make_reader
from tests.unit.tiny import Tiny
from training.config import DataConfig
from training.data.manifest import SPLITS, Manifest, load_manifest
from training.data.source import open_source
from training.data.writer import Writer, WriteResult, _one_behind, split_of, write_dataset
from training.errors import InfrastructureError, UserError
from training.recipe import Recipe, Record, Sample
from training.s3.objectstore import Store
from training.s3.quickrequests import QuickRequests

NUM_RECORDS = 240
NUM_FILES = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files of 60 records each: four partitions."""
    write_files(tmp_path, num_files=NUM_FILES)
    return tmp_path


def write(store: Store, folder: Path, config: DataConfig | None = None, recipe: Recipe | None = None) -> WriteResult:
    config = config or data_config()
    return write_dataset(store, local_source(folder, config), config, recipe or Tiny())


def corner(store: Store, name: str) -> Store:
    """Another empty corner of the same store."""
    other = Store(replace(store.location, prefix=f"{store.location.prefix}{name}/"))
    other.__dict__.update(_clients=store._clients)
    return other


def shard_keys(store: Store) -> list[str]:
    return [key for key, _ in store.list_keys("datasets/tiny/shards/")]


def num_shards(manifest: Manifest) -> int:
    return sum(len(shards) for shards in manifest.splits.values())


def all_ids(store: Store, manifest: Manifest) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        reader = make_reader(store, "tiny", manifest, split)
        found[split] = list(reader.read(range(len(reader))).ids)
    return found


def test_everything_is_written_once_and_can_be_read(store: Store, folder: Path) -> None:
    result = write(store, folder)
    manifest = load_manifest(store, "tiny", result.manifest.digest)
    assert manifest == result.manifest
    assert (result.num_partitions, result.num_partitions_reused) == (NUM_FILES, 0)
    assert result.num_shards_sent == len(shard_keys(store)) == num_shards(manifest) > NUM_FILES
    ids = [sample for split in all_ids(store, manifest).values() for sample in split]
    assert sorted(ids) == sorted(f"{number // 60}.csv:{number % 60 + 1}#0" for number in range(NUM_RECORDS))


def test_the_fields_are_what_the_recipe_gave(store: Store, folder: Path) -> None:
    manifest = write(store, folder).manifest
    reader = make_reader(store, "tiny", manifest, "train")
    rows = reader.read([len(reader) - 1, 0])
    ids, fields = rows.ids, rows.fields
    for position, sample_id in enumerate(ids):
        file, line = sample_id.removesuffix("#0").split(".csv:")
        (sample,) = Tiny().encode(Record(id="x", data=tiny_line(int(file) * 60 + int(line) - 1).encode()))
        assert np.array_equal(fields["x"][position], sample["x"])
        assert fields["label"][position] == sample["label"]
    assert manifest.fields["x"].shape == (5,)
    assert manifest.fields["label"].dtype == "int64"


def test_a_rerun_sends_nothing_and_gives_the_same_digest(store: Store, folder: Path) -> None:
    first = write(store, folder)
    again = write(store, folder)
    assert again.manifest.digest == first.manifest.digest
    assert (again.num_partitions_reused, again.num_shards_sent) == (NUM_FILES, 0)


def test_the_digest_is_the_same_in_an_empty_store(store: Store, folder: Path) -> None:
    first, second = (write(corner(store, name), folder).manifest.digest for name in ("a", "b"))
    assert first == second


def test_the_same_records_from_s3_give_the_same_digest(store: Store, folder: Path) -> None:
    for path in (folder / "raw").iterdir():
        store.put(f"source/{path.name}", path.read_bytes())
    config = data_config()
    from_s3 = open_source(
        replace(config, source=store.location.uri("source")), folder="", location=replace(store.location, prefix="")
    )
    assert write_dataset(store, from_s3, config, Tiny()).manifest == write(corner(store, "b"), folder).manifest


def test_appended_records_touch_only_their_own_partition(store: Store, folder: Path) -> None:
    first = write(store, folder)
    before = set(shard_keys(store))
    write_csv(folder / "raw/9.csv", range(1000, 1060))
    second = write(store, folder)
    assert second.num_partitions_reused == NUM_FILES
    assert second.num_shards_sent == len(set(shard_keys(store)) - before) > 0
    assert before < set(shard_keys(store))
    assert second.manifest.digest != first.manifest.digest
    assert load_manifest(store, "tiny", first.manifest.digest) == first.manifest


def test_a_first_writer_makes_no_client(store: Store, folder: Path) -> None:
    """That takes longer than all other things that are not for its bytes."""
    fresh = Store(store.location)
    write(fresh, folder)
    assert not {"patient", "impatient"} & set(vars(fresh._clients))


def write_whole_files(folder: Path) -> None:
    (folder / "raw").mkdir()
    for number in range(40):
        (folder / f"raw/{number:02d}").write_text(tiny_line(number))


def test_a_first_writer_reads_each_file_once_and_asks_for_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole_files(tmp_path)
    config = data_config(format="files")
    source = local_source(tmp_path, config)
    opened: list[str] = []
    asked: list[str] = []
    open_file, ask = source.open, QuickRequests.ask
    monkeypatch.setattr(source, "open", lambda file: opened.append(file.name) or open_file(file))
    monkeypatch.setattr(
        QuickRequests, "ask", lambda self, method, key, **more: asked.append(method) or ask(self, method, key, **more)
    )
    first = write_dataset(Store(store.location), source, config, Tiny())
    assert sorted(opened) == [f"{number:02d}" for number in range(40)]
    assert "HEAD" not in asked
    assert asked.count("GET") < 6, "receipts were looked for"
    again = write_dataset(Store(store.location), source, config, Tiny())
    assert again.num_partitions_reused == first.num_partitions > 1
    assert again.manifest == first.manifest


@pytest.mark.parametrize("apply_first", [False, True], ids=["not applied", "lost reply"])
def test_a_first_writer_that_tries_a_partition_again_sends_nothing_twice(
    store: Store, folder: Path, apply_first: bool
) -> None:
    sent: list[str] = []

    def fails(key: str) -> bool:
        sent.append(key)
        return len(sent) == 3

    faulty = FaultyStore(store, fails, apply_first=apply_first)
    writer = Writer(faulty, local_source(folder, data_config()), data_config(), Tiny())
    with pytest.raises(InfrastructureError):
        writer.write(writer.parts[0])
    assert faulty.num_faults == 1
    result = writer.write(writer.parts[0])
    assert (
        result.receipt
        == Writer(store, local_source(folder, data_config()), data_config(), Tiny()).write(writer.parts[0]).receipt
    )
    num_twice = len(sent) - len(set(sent))
    assert num_twice == (not apply_first), "only what was not applied is sent again"


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupted_writer_is_simply_run_again(store: Store, folder: Path, after: int) -> None:
    clean = write(corner(store, "clean"), folder)
    sent: list[str] = []

    def interrupt(key: str) -> bool:
        sent.append(key)
        return len([key for key in sent if "/shards/" in key]) > after

    faulty = FaultyStore(store, interrupt)
    with pytest.raises(InfrastructureError):
        write(faulty, folder)
    assert faulty.num_faults == 1
    assert not list(store.list_keys("datasets/tiny/manifests/"))
    assert len(shard_keys(store)) == after
    result = write(store, folder)
    assert result.manifest.digest == clean.manifest.digest
    assert result.num_shards_sent == clean.num_shards_sent - after


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_shard_is_noticed_and_repaired_by_a_rerun(store: Store, folder: Path, damage: str) -> None:
    first = write(store, folder)
    victim = shard_keys(store)[2]
    good = store.get(victim)
    if damage == "flip":
        store.put(victim, good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "cut":
        store.put(victim, good[:-1])
    else:
        store.delete(victim)
    again = write(store, folder)
    assert again.manifest.digest == first.manifest.digest
    assert (again.num_shards_sent, again.num_partitions_reused) == (1, NUM_FILES - 1)
    assert store.get(victim) == good


def test_a_damaged_manifest_is_repaired_by_a_rerun(store: Store, folder: Path) -> None:
    first = write(store, folder)
    ((key, _),) = store.list_keys("datasets/tiny/manifests/")
    store.put(key, b"{}")
    write(store, folder)
    assert load_manifest(store, "tiny", first.manifest.digest) == first.manifest


@pytest.mark.parametrize("damage", ["cut", "digit"])
def test_a_damaged_receipt_is_not_believed(store: Store, folder: Path, damage: str) -> None:
    first = write(store, folder)
    key, _ = next(store.list_keys("datasets/tiny/parts/"))
    good = store.get(key)
    number = re.search(rb'"num_samples":\d*(\d)', good)
    assert number is not None
    digit = bytes([good[number.start(1)] ^ 1])  # 4 becomes 5, and it is still a receipt
    store.put(key, good[:20] if damage == "cut" else good[: number.start(1)] + digit + good[number.end(1) :])
    again = write(store, folder)
    assert again.manifest.digest == first.manifest.digest
    assert store.get(key) == good


def test_what_encodes_the_records_is_part_of_the_receipts_name(store: Store, folder: Path) -> None:
    write(store, folder)
    for config, recipe in ((data_config(shard_bytes=2048), Tiny()), (data_config(), Tiny(scale=2.0))):
        assert write(store, folder, config, recipe).num_partitions_reused == 0


def test_another_way_of_reading_looks_at_finished_partitions_anew(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may lack what an earlier release skipped in silence."""
    first = write(store, folder)
    monkeypatch.setattr("training.data.writer.READING", 0)
    again = write(store, folder)
    assert (again.num_partitions_reused, again.num_shards_sent) == (0, 0)
    assert again.manifest == first.manifest


def test_equal_records_are_never_in_both_splits(store: Store, tmp_path: Path) -> None:
    numbers = [*range(80), *range(80), *range(40, 80)]
    for file, start in (("a", 0), ("b", 100)):
        lines = "".join(f"{tiny_line(number)}\n" for number in numbers[start : start + 100])
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / f"raw/{file}.csv").write_text(lines)
    manifest = write(store, tmp_path).manifest
    inputs: dict[str, set[bytes]] = {}
    num_samples = 0
    for split in SPLITS:
        reader = make_reader(store, "tiny", manifest, split)
        rows = reader.read(range(len(reader))).fields["x"]
        inputs[split] = {row.tobytes() for row in rows}
        num_samples += len(rows)
    assert num_samples == len(numbers)
    assert inputs["train"]
    assert inputs["test"]
    assert not inputs["train"] & inputs["test"]


def test_the_split_is_a_function_of_the_bytes_and_has_about_its_share() -> None:
    records = [Record(id=str(number), data=tiny_line(number).encode()) for number in range(2000)]
    splits = [split_of(record, 20) for record in records]
    assert splits == [split_of(replace(record, id="other"), 20) for record in records]
    assert 300 < splits.count("test") < 500
    small = {record.data for record in records if split_of(record, 10) == "test"}
    assert small < {record.data for record in records if split_of(record, 20) == "test"}


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["1,2,x,4,5,0", "1,2", "1;2"])
def test_an_unreadable_record_is_named_by_file_and_line(store: Store, folder: Path, bad: str) -> None:
    lines = (folder / "raw/2.csv").read_text().splitlines()
    (folder / "raw/2.csv").write_text("\n".join([*lines[:6], bad, *lines[6:]]))
    with pytest.raises(UserError, match=r"cannot read record 2\.csv:7: "):
        write(store, folder)


@dataclass(frozen=True, kw_only=True)
class Raising(Tiny):
    """Fails at line 34 of the first file, in the way that `mistake` says."""

    mistake: str = ""

    def encode(self, record: Record) -> Iterable[Sample]:
        if record.id == "0.csv:34":
            if self.mistake == "overflow":
                yield {"x": np.array(300, dtype=np.uint8)}
            elif self.mistake == "attribute":
                record.text  # type: ignore[attr-defined]  # noqa: B018
            elif self.mistake == "zero":
                yield {"x": np.array(1 / len(b""))}
        yield from super().encode(record)


@pytest.mark.parametrize("mistake", ["overflow", "attribute", "zero"])
def test_a_mistake_in_the_recipes_encode_is_named_by_file_and_line(store: Store, folder: Path, mistake: str) -> None:
    with pytest.raises(UserError, match=r"cannot read record 0\.csv:34: "):
        write(store, folder, recipe=Raising(mistake=mistake))


@dataclass(frozen=True, kw_only=True)
class Ragged(Tiny):
    """The samples of `split` have a field of another shape or dtype."""

    split: str = ""
    dtype: str = "float32"
    num_inputs: int = 5

    def encode(self, record: Record) -> Iterable[Sample]:
        for sample in super().encode(record):
            if split_of(record, 20) == self.split or record.id.startswith(self.split):
                sample = {**sample, "x": np.zeros(self.num_inputs, dtype=self.dtype)}
            yield sample


@pytest.mark.parametrize("split", ["test", "0.csv:3", "3.csv"], ids=["split", "record", "file"])
@pytest.mark.parametrize(("dtype", "num_inputs"), [("float64", 5), ("float32", 4)], ids=["dtype", "shape"])
def test_samples_that_differ_in_their_fields_are_refused(
    store: Store, folder: Path, split: str, dtype: str, num_inputs: int
) -> None:
    first = r"3\.csv: its samples'" if split == "3.csv" else r"record 0\.csv:\d+#0: its"
    told = rf"{first} fields are not those of .*: field 'x' is {dtype}\[\d\], not float32\[\d\]"
    if split == "test":  # whichever comes first is what the other one differs from
        told = "its fields are not those of the records before: field 'x' is"
    with pytest.raises(UserError, match=told):
        write(store, folder, recipe=Ragged(split=split, dtype=dtype, num_inputs=num_inputs))


def test_a_field_of_an_unknown_dtype_is_named(store: Store, folder: Path) -> None:
    with pytest.raises(UserError, match=r"record 0\.csv:\d+#0: field 'x' has dtype complex64"):
        write(store, folder, recipe=Ragged(split="0", dtype="complex64"))


def test_a_source_too_small_to_split_is_named(store: Store, tmp_path: Path) -> None:
    write_csv(tmp_path / "raw/0.csv", range(1))
    with pytest.raises(UserError, match=r"data.source = 'raw' gives no sample for the (test|train) split"):
        write(store, tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "files", "csv.gz"])
def test_other_formats(store: Store, tmp_path: Path, kind: str) -> None:
    if kind == "files":
        for number in range(40):
            (tmp_path / "raw").mkdir(exist_ok=True)
            (tmp_path / f"raw/{number:02d}").write_text(tiny_line(number))
        config, expected = data_config(format="files"), {f"{number:02d}#0" for number in range(40)}
    else:
        write_csv(tmp_path / f"raw/0.{kind}", range(40))
        config = data_config(format="jsonl" if kind == "jsonl" else "csv")
        expected = {f"0.{kind}:{number + 1}#0" for number in range(40)}
    manifest = write(store, tmp_path, config).manifest
    ids = [sample for split in all_ids(store, manifest).values() for sample in split]
    assert len(ids) == 40
    assert set(ids) == expected


def test_lines_appended_to_a_file_send_only_new_shards(store: Store, folder: Path) -> None:
    """All full shards of before are shared; those that were not full are made anew."""
    first = write(store, folder)
    with (folder / "raw/3.csv").open("a") as file:
        file.writelines(f"{tiny_line(number)}\n" for number in range(5000, 5030))
    before = set(shard_keys(store))
    second = write(store, folder)
    assert second.num_partitions_reused == NUM_FILES - 1
    assert second.num_shards_sent == len(set(shard_keys(store)) - before)
    for split in SPLITS:
        old, new = first.manifest.splits[split], second.manifest.splits[split]
        assert len(set(old) - set(new)) <= 1


def test_withdrawn_records_are_left_out_and_only_their_partition_is_written_again(store: Store, folder: Path) -> None:
    first = write(store, folder)
    config = data_config()
    source = local_source(folder, config)
    second = write_dataset(store, source, config, Tiny(), withdrawn={"1.csv:7": "", "elsewhere.csv:1": ""})
    assert second.num_partitions_reused == NUM_FILES - 1
    gone = {i for ids in all_ids(store, first.manifest).values() for i in ids}
    gone -= {i for ids in all_ids(store, second.manifest).values() for i in ids}
    assert gone == {"1.csv:7#0"}


NO_SAMPLES: dict[str, Any] = {
    "list": [1, 2],
    "number": 7,
    "number in a field": {"x": 7},
    "list in a field": {"x": [1.0]},
    "number as a name": {1: np.zeros(2)},
    "reserved name": {"__metadata__": np.zeros(2)},
    "no field": {},
    "masked": {"x": np.ma.masked_array([1.0, 2.0], mask=[False, True])},
}


@dataclass(frozen=True, kw_only=True)
class Careless(Tiny):
    """Gives something else than a dict of arrays."""

    gives: str

    def encode(self, record: Record) -> Iterable[Sample]:
        return [NO_SAMPLES[self.gives]]


@pytest.mark.parametrize("gives", NO_SAMPLES)
def test_what_is_no_sample_is_named_by_its_record(store: Store, folder: Path, gives: str) -> None:
    config = data_config()
    with pytest.raises(UserError, match=r"record 0\.csv:\d+#0: "):
        write_dataset(store, local_source(folder, config), config, Careless(gives=gives))


def test_a_mask_is_never_dropped(store: Store, folder: Path) -> None:
    class Masking(Tiny):
        def encode(self, record: Record) -> Iterable[Sample]:
            for sample in super().encode(record):
                is_masked = record.id == "0.csv:9"
                yield {**sample, "x": np.ma.masked_array(sample["x"], mask=True)} if is_masked else sample

    config = data_config()
    with pytest.raises(UserError, match=r"record 0\.csv:9#0: field 'x' is masked"):
        write_dataset(store, local_source(folder, config), config, Masking())


def test_a_file_that_changes_while_it_is_read_leaves_no_receipt(store: Store, folder: Path) -> None:
    config = data_config()
    source = local_source(folder, config)
    changed = folder / "raw/1.csv"
    before = changed.read_bytes()

    class Changing(Tiny):
        def encode(self, record: Record) -> Iterable[Sample]:
            changed.write_bytes(before + b"1,2,3,4,5,1\n")
            return super().encode(record)

    with pytest.raises(UserError, match=r"1\.csv was changed while it was read"):
        write_dataset(store, source, config, Changing())
    changed.write_bytes(before)
    assert write(store, folder).manifest == write(corner(store, "clean"), folder).manifest


def test_a_whole_file_that_changes_after_it_was_read_once_leaves_no_receipt(store: Store, tmp_path: Path) -> None:
    write_whole_files(tmp_path)
    config = data_config(format="files")
    changed = tmp_path / "raw/07"

    class Changing(Tiny):
        def encode(self, record: Record) -> Iterable[Sample]:
            if record.id == "07":
                changed.write_text(tiny_line(700))
            return super().encode(record)

    with pytest.raises(UserError, match=r"07 was changed while it was read"):
        write(store, tmp_path, config, Changing())
    clean = corner(store, "clean")
    assert write(store, tmp_path, config).manifest == write(clean, tmp_path, config).manifest


def test_a_recipe_may_use_one_array_for_all_its_samples(store: Store, folder: Path) -> None:
    class Reusing(Tiny):
        def encode(self, record: Record) -> Iterable[Sample]:
            (sample,) = super().encode(record)
            array = np.array(sample["x"])
            for number in range(3):
                array[:] = number
                yield {**sample, "x": array}

    config = data_config()
    manifest = write_dataset(store, local_source(folder, config), config, Reusing()).manifest
    found = make_reader(store, "tiny", manifest, "train").read([0, 1, 2]).fields["x"]
    assert found[:, 0].tolist() == [0.0, 1.0, 2.0]


def test_one_byte_order_for_all_machines(store: Store, folder: Path) -> None:
    class Swapping(Tiny):
        def encode(self, record: Record) -> Iterable[Sample]:
            order = "<>"[int(record.id.rpartition(":")[2]) % 2]
            for sample in super().encode(record):
                yield {name: array.astype(array.dtype.newbyteorder(order)) for name, array in sample.items()}

    config = data_config()
    assert (
        write_dataset(store, local_source(folder, config), config, Swapping()).manifest == write(store, folder).manifest
    )


def test_a_ragged_field_without_a_length_is_named(store: Store, folder: Path) -> None:
    class Lengthless(Tiny):
        ragged = frozenset({"x"})

        def encode(self, record: Record) -> Iterable[Sample]:
            yield {"x": np.zeros(3)}
            yield {"x": np.array(3.0)}

    config = data_config()
    with pytest.raises(UserError, match=r"record 0\.csv:1#1: field 'x' is in the recipe's `ragged`, but has no length"):
        write_dataset(store, local_source(folder, config), config, Lengthless())


def test_one_item_is_made_while_another_is_worked_on() -> None:
    made, worked = [], []

    def items() -> Iterable[int]:
        for number in range(5):
            made.append(number)
            assert len(made) - len(worked) <= 2, "memory would grow with the source"
            yield number

    def work(number: int) -> int:
        if number == 3:
            raise InfrastructureError("three")
        worked.append(number)
        return 10 * number

    done: list[int] = []
    with pytest.raises(InfrastructureError, match="three"):
        done.extend(_one_behind(work, items()))
    assert (made, worked) == ([0, 1, 2, 3, 4], [0, 1, 2])
