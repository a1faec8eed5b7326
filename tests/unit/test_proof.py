"""A run's job and recipe are its own, whatever else lies on the store under its name: nothing of that is imported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.tiny import Tiny
from training.config import LaunchConfig, ParallelConfig, Preset
from training.documents import canonical_json, sha256_hex
from training.errors import DamagedError, UserError
from training.preset_file import load_preset
from training.recipe import load_recipe
from training.runs.identity import identity_key, keep_identity
from training.runs.job import Job, read_jobs, store_job
from training.runs.proof import find_job, own_recipe
from training.runs.record import run_key
from training.s3.objectstore import Store
from training.sources import closure_without_import, find_module, source_closure

RECIPE = """
from dataclasses import dataclass

from helper_of_{name} import NOTE
from tests.unit.tiny import Tiny


@dataclass(frozen=True, kw_only=True)
class Own(Tiny):
    note: str = NOTE
"""


def preset_beside(folder: Path, name: str) -> Preset:
    """Of a recipe with a helper, both beside it. Names are a test's own, as modules stay imported."""
    folder.mkdir()
    (folder / f"recipe_of_{name}.py").write_text(RECIPE.format(name=name))
    (folder / f"helper_of_{name}.py").write_text("NOTE = 'ours'\n")
    return replace(load_preset("digits"), recipe=f"recipe_of_{name}:Own", folder=str(folder), hyperparameters={})


def begun(store: Store, preset: Preset) -> Job:
    """A run of it, which has one job."""
    run: Any = {"recipe": load_recipe(preset), "preset": preset, "dataset_digest": "d" * 64}
    key = run_key(**run)
    keep_identity(store, key, **run)
    job = Job(key=key, generation=0, preset=preset, dataset_digest="d" * 64, location=store.location)
    store_job(store, job)
    return job


def planted(store: Store, job: Job) -> None:
    """Such that it is read first."""
    number = 0
    first = min(sha256_hex(canonical_json(one.to_json())) for one in read_jobs(store, job.key))
    while True:
        number += 1
        launch = replace(job.preset.launch, grace_seconds=float(number))
        data = canonical_json(replace(job, preset=replace(job.preset, launch=launch)).to_json())
        if sha256_hex(data) < first:
            store.put(f"runs/{job.key}/jobs/{sha256_hex(data)}.json", data)
            return


def evil(folder: Path, *modules: str) -> Path:
    """A folder whose modules tell that they were imported."""
    folder.mkdir()
    for module in modules:
        (folder / f"{module}.py").write_text(f"open({str(folder / 'canary')!r}, 'w').close()\n")
    return folder


def test_of_several_jobs_the_one_is_found_that_the_key_is_of(store: Store, tmp_path: Path) -> None:
    job = begun(store, preset_beside(tmp_path / "own", "several"))
    folder = evil(tmp_path / "evil", "elsewhere_of_several")
    for wrong in (
        replace(job, preset=replace(job.preset, recipe="elsewhere_of_several:Own", folder=str(folder))),
        replace(job, preset=replace(job.preset, train=replace(job.preset.train, steps=7))),
        replace(job, preset=replace(job.preset, seed=job.preset.seed + 1)),
        replace(job, preset=replace(job.preset, parallel=ParallelConfig(tensor=2), launch=LaunchConfig(nodes=2))),
        replace(job, dataset_digest="e" * 64),
    ):
        planted(store, wrong)
    assert find_job(store, job.key) == job
    assert own_recipe(store, job) == load_recipe(job.preset)
    for key, _ in list(store.list_keys(f"runs/{job.key}/jobs/")):
        if store.get(key) == canonical_json(job.to_json()):
            store.delete(key)
    with pytest.raises(DamagedError, match=r"/jobs/: the run key is of none of its jobs: "):
        find_job(store, job.key)
    assert find_job(store, "k") is None
    assert not (folder / "canary").exists()


def test_nothing_is_imported_from_a_folder_that_a_job_names(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the recipe's file is the run's, and what it imports is another."""
    job = begun(store, preset_beside(tmp_path / "own", "folder"))
    recipe = (tmp_path / "own" / "recipe_of_folder.py").read_text()
    folder = evil(tmp_path / "evil", "recipe_of_folder", "helper_of_folder")
    there = replace(job, preset=replace(job.preset, folder=str(folder)))
    for _ in range(2):
        for may_have_changed in (False, True):
            with pytest.raises(UserError, match=f"beside {folder} is another one today.*not imported"):
                own_recipe(store, there, may_have_changed=may_have_changed)
        (folder / "recipe_of_folder.py").write_text(recipe)
    assert not (folder / "canary").exists()
    monkeypatch.chdir(tmp_path)
    (folder / "helper_of_folder.py").write_text("NOTE = 'changed'\n")
    with pytest.raises(UserError, match="is another one today"):
        own_recipe(store, there)
    assert own_recipe(store, there, may_have_changed=True).note == "changed", "one's own folder"  # type: ignore[attr-defined]
    other = replace(there, preset=replace(there.preset, recipe="tests.unit.tiny:Tiny"))
    with pytest.raises(UserError, match="is another one today"):
        own_recipe(store, other, may_have_changed=True)


def test_other_hyperparameters_are_refused(store: Store, tmp_path: Path) -> None:
    job = begun(store, preset_beside(tmp_path / "own", "hyper"))
    with pytest.raises(UserError, match="has other hyperparameters than its run key is of"):
        own_recipe(store, replace(job, preset=replace(job.preset, hyperparameters={"note": "theirs"})))


def test_of_an_earlier_releases_run_our_own_recipes_alone_are_imported(store: Store, tmp_path: Path) -> None:
    job = begun(store, preset_beside(tmp_path / "own", "earlier"))
    store.delete(identity_key(job.key))
    with pytest.raises(UserError, match=r"earlier release.*'recipe_of_earlier:Own' is not imported"):
        own_recipe(store, job)
    ours = begun(store, load_preset("digits"))
    store.delete(identity_key(ours.key))
    assert own_recipe(store, ours) == load_recipe(ours.preset)


def test_what_would_be_imported_is_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = evil(tmp_path / "kit", "__init__", "part")
    assert find_module("kit.part", str(tmp_path)).origin == str(package / "part.py")  # type: ignore[union-attr]
    assert find_module("kit.part.deeper", str(tmp_path)) is None
    assert find_module("kit.part", "") is None
    assert closure_without_import("no.such.module:Recipe", str(tmp_path)) == {}
    assert not (package / "canary").exists()
    monkeypatch.setitem(__import__("sys").modules, "made_not_found", ModuleType("made_not_found"))
    assert find_module("made_not_found", "") is None
    assert closure_without_import("tests.unit.tiny:Tiny", "") == source_closure(Tiny())
    digits = load_preset("digits")
    assert closure_without_import(digits.recipe, digits.folder) == source_closure(load_recipe(digits))
