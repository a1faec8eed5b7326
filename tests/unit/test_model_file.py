"""The model file on the store: kept once, proven each time, mended from what was registered, refused when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tasks.lifecycle import model_file
from tasks.register import save_model
from tests.unit.champions import SIGNATURE, keep, program
from training.errors import DamagedError, UserError
from training.s3.objectstore import Store


def test_file_and_what_is_known_of_it_are_kept(store: Store) -> None:
    kept = keep(store, "m", "1")
    assert model_file.prove(store, kept) == program("1").data
    assert model_file.find(store, "m", "1") == kept
    assert (kept.signature, kept.num_bytes) == (SIGNATURE, len(program("1").data))
    assert sorted(key for key, _ in store.list_keys("models/")) == [
        f"models/m/files/{kept.model_sha256}.pt2",
        "models/m/versions/1.json",
    ]


def test_who_comes_later_is_told_what_was_kept_first(store: Store) -> None:
    first = keep(store, "m", "1")
    later = model_file.keep(
        store,
        "m",
        "1",
        run_key="run 1",
        weights_sha256="w",
        dataset_digest="d" * 64,
        fetch=lambda: pytest.fail("it was fetched again"),
    )
    assert later == first


def test_damaged_file_is_refused_and_mended_by_registering_again(store: Store) -> None:
    kept = keep(store, "m", "1")
    key = model_file.file_key("m", kept.model_sha256)
    store.put(key, b"program 2")
    with pytest.raises(DamagedError, match=key):
        model_file.prove(store, kept)
    store.delete(key)
    with pytest.raises(DamagedError, match="is missing, the model file of version 1"):
        model_file.prove(store, kept)
    assert keep(store, "m", "1") == kept
    assert model_file.prove(store, kept) == program("1").data


def test_other_bytes_do_not_mend_it(store: Store) -> None:
    kept = keep(store, "m", "1")
    store.delete(model_file.file_key("m", kept.model_sha256))
    with pytest.raises(DamagedError, match="MLflow has other bytes of version 1"):
        model_file.keep(
            store, "m", "1", run_key="run 1", weights_sha256="w", dataset_digest="d", fetch=lambda: program("2")
        )


def test_number_that_the_registry_gave_again_is_the_new_runs(store: Store) -> None:
    """MLflow's database was lost: it numbers versions from 1."""
    keep(store, "m", "1")
    assert keep(store, "m", "1", run_key="another").run_key == "another"
    assert model_file.find(store, "m", "1").run_key == "another"


def test_version_without_file_and_damaged_document_are_named(store: Store) -> None:
    with pytest.raises(UserError, match="version 7 has no model file on the store"):
        model_file.find(store, "m", "7")
    key = model_file.version_key("m", keep(store, "m", "1").version)
    document = store.read_versioned(key).document
    store.put(key, store.get(key).replace(b"run 1", b"run 2"))
    with pytest.raises(DamagedError, match=key):
        model_file.find(store, "m", "1")
    assert document["kept"]["run_key"] == "run 1"


SOURCE = """
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = torch.nn.Linear(4, 2, bias=False)
        torch.nn.init.ones_(self.scores.weight)
    def forward(self, rows):
        return self.scores(rows).relu()
"""


def test_program_is_the_same_wherever_the_recipe_lies(tmp_path: Path) -> None:
    inputs = torch.zeros(2, 4).numpy()
    saved = []
    for number in range(2):
        source = tmp_path / f"{number}" / "recipe.py"
        source.parent.mkdir()
        source.write_text("\n" * number + SOURCE)
        names: dict[str, type[torch.nn.Module]] = {"__name__": "recipe"}  # type: ignore[dict-item]
        exec(compile(source.read_text(), str(source), "exec"), names)
        folder = tmp_path / f"model-{number}"
        save_model(names["Model"]().eval(), inputs, folder, None)
        saved.append((folder / "data" / "model.pt2").read_bytes())
    assert saved[0] == saved[1]
    assert str(tmp_path).encode() not in saved[0]
