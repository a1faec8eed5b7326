"""Finding a user's recipe, and naming the code that decides what it computes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.tiny import Tiny, tiny_preset
from training.config import Preset
from training.errors import UserError
from training.recipe import Recipe, load_recipe
from training.sources import source_closure_digest

GOOD = """
from dataclasses import dataclass
from tests.unit.tiny import Tiny

@dataclass(frozen=True, kw_only=True)
class Mine(Tiny):
    width: int = 3
"""


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for a preset and its modules; what was imported from it is forgotten afterwards."""
    yield tmp_path
    forget(tmp_path)


def forget(folder: Path) -> None:
    for name, module in list(sys.modules.items()):
        if str(folder) in str(getattr(module, "__file__", "")):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if not entry.startswith(str(folder))]


def preset_in(folder: Path, recipe: str, **hyperparameters: object) -> Preset:
    return replace(tiny_preset(), recipe=recipe, folder=str(folder), hyperparameters=hyperparameters)


def load(folder: Path, recipe: str, **hyperparameters: object) -> Recipe:
    return load_recipe(preset_in(folder, recipe, **hyperparameters))


def test_a_module_beside_the_preset_is_found_and_filled(beside: Path) -> None:
    (beside / "my_recipe_a.py").write_text(GOOD)
    recipe = load(beside, "my_recipe_a:Mine", width=5, scale=2)
    assert isinstance(recipe, Tiny)
    assert (recipe.width, recipe.scale, recipe.learning_rate) == (5, 2.0, 0.05)  # type: ignore[attr-defined]


def test_an_installed_recipe_is_found() -> None:
    assert type(load_recipe(tiny_preset())).__name__ == "Tiny"


@pytest.mark.parametrize(
    ("source", "recipe", "message"),
    [
        (None, "no_such_module_x:Mine", "no module 'no_such_module_x' beside"),
        (GOOD, "my_recipe_b:Other", "module 'my_recipe_b' has no class 'Other'"),
        ("class Mine: pass", "my_recipe_b:Mine", "is not a subclass of training.recipe.Recipe"),
        ("Mine = 5", "my_recipe_b:Mine", "5 is not a subclass of training.recipe.Recipe"),
        ("import no_such_library", "my_recipe_b:Mine", "no module 'no_such_library'"),
        ("1 / 0", "my_recipe_b:Mine", "importing it failed: ZeroDivisionError"),
        ("def f(:", "my_recipe_b:Mine", "importing it failed: SyntaxError"),
        (
            "from dataclasses import dataclass\nfrom training.recipe import Recipe\n"
            "@dataclass(frozen=True, kw_only=True)\nclass Mine(Recipe):\n    def model(self): ...",
            "my_recipe_b:Mine",
            "Mine lacks encode, inputs, loss, optimizer, scores",
        ),
    ],
    ids=["module", "class", "not a recipe", "not a class", "library", "raises", "syntax", "abstract"],
)
def test_a_recipe_that_cannot_be_had_is_explained(beside: Path, source: str | None, recipe: str, message: str) -> None:
    if source is not None:
        (beside / "my_recipe_b.py").write_text(source)
    with pytest.raises(UserError) as caught:
        load(beside, recipe)
    assert f"recipe = {recipe!r}: " in str(caught.value)
    assert message in str(caught.value)


def test_an_unknown_hyperparameter_is_named_with_the_nearest(beside: Path) -> None:
    (beside / "my_recipe_c.py").write_text(GOOD)
    with pytest.raises(UserError, match=r"unknown key 'hyperparameters\.widht' \(did you mean 'width'\?\)"):
        load(beside, "my_recipe_c:Mine", widht=5)


def test_a_hyperparameter_of_a_wrong_type_is_named(beside: Path) -> None:
    (beside / "my_recipe_d.py").write_text(GOOD)
    with pytest.raises(UserError, match=r"hyperparameters\.width = 'wide'"):
        load(beside, "my_recipe_d:Mine", width="wide")


def test_a_hyperparameter_without_a_value_is_named(beside: Path) -> None:
    (beside / "my_recipe_e.py").write_text(GOOD.replace("width: int = 3", "width: int"))
    with pytest.raises(UserError, match=r"missing key: hyperparameters\.width"):
        load(beside, "my_recipe_e:Mine")


@pytest.mark.parametrize("kind", ["ValueError", "TypeError"])
def test_a_recipes_own_check_of_its_fields_is_the_users_error(beside: Path, kind: str) -> None:
    check = f"    def __post_init__(self):\n        raise {kind}('width must be even')\n"
    (beside / "my_recipe_f.py").write_text(GOOD + check)
    with pytest.raises(UserError, match="width must be even"):
        load(beside, "my_recipe_f:Mine")


def test_two_folders_may_each_have_a_module_of_one_name(tmp_path: Path) -> None:
    """One process may load both: then each preset gets its own, or is told why not, but never the other's."""
    got: list[int] = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "my_recipe_g.py").write_text(GOOD.replace("width: int = 3", f"width: int = {number}"))
        try:
            got.append(load(folder, "my_recipe_g:Mine").width)  # type: ignore[attr-defined]
        except UserError:
            got.append(number)
    forget(tmp_path)
    assert got == [1, 2]


def test_libraries_below_a_presets_folder_are_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project often holds its own `.venv`: to import torch or numpy a second time in one process breaks them."""
    libraries = tmp_path / "first" / ".venv" / "site-packages"
    libraries.mkdir(parents=True)
    (libraries / "library_h.py").write_text("")
    monkeypatch.syspath_prepend(libraries)
    (tmp_path / "first" / "my_recipe_k.py").write_text(f"import library_h\n{GOOD}")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "my_recipe_l.py").write_text(GOOD)
    load(tmp_path / "first", "my_recipe_k:Mine")
    library = sys.modules["library_h"]
    load(tmp_path / "second", "my_recipe_l:Mine")
    found = sys.modules.get("library_h")
    forget(tmp_path)
    assert found is library


# ---- the digest of the source ----------------------------------------------------------------------------------------


def digest(folder: Path, module: str) -> str:
    """As another process would compute it: nothing of the folder is imported yet."""
    forget(folder)
    return source_closure_digest(load(folder, f"{module}:Mine"))


def changes_digest(folder: Path, module: str, changed: str) -> bool:
    before = digest(folder, module)
    path = folder / changed
    path.write_text(path.read_text() + "\n# another comment\n")
    return digest(folder, module) != before


@pytest.mark.parametrize(
    "statement",
    [
        "import helper_m",
        "import helper_m as h",
        "from helper_m import VALUE",
        "def late():\n    import helper_m",
        "import other_m",
    ],
    ids=["import", "as", "from", "inside a function", "through another module"],
)
def test_a_sibling_that_is_imported_counts(beside: Path, statement: str) -> None:
    (beside / "my_recipe_h.py").write_text(f"{statement}\n{GOOD}")
    (beside / "helper_m.py").write_text("VALUE = 1\n")
    (beside / "other_m.py").write_text("import helper_m\n")
    assert changes_digest(beside, "my_recipe_h", "helper_m.py")


def test_the_recipes_own_source_counts_and_a_file_that_is_not_imported_does_not(beside: Path) -> None:
    (beside / "my_recipe_i.py").write_text(GOOD)
    for name in ("unrelated.py", "notes.txt"):
        (beside / name).write_text("")
        assert not changes_digest(beside, "my_recipe_i", name)
    assert changes_digest(beside, "my_recipe_i", "my_recipe_i.py")


def test_the_digest_does_not_depend_on_the_folder(beside: Path) -> None:
    found = set()
    for name in ("a", "b"):
        (beside / name).mkdir()
        (beside / name / "my_recipe_j.py").write_text(f"import helper_n\n{GOOD}")
        (beside / name / "helper_n.py").write_text("")
        forget(beside)
        found.add(digest(beside / name, "my_recipe_j"))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("module", "statement", "changed"),
    [
        ("pkg_k.deep.mine", "from pkg_k import layers", "layers.py"),
        ("pkg_k.deep.mine", "from ..layers import VALUE", "layers.py"),
        ("pkg_k.deep.mine", "from .. import layers", "layers.py"),
        ("pkg_k.deep.mine", "import pkg_k.layers", "layers.py"),
        ("pkg_k.deep.mine", "from . import near", "deep/near.py"),
        ("pkg_k.mine", "from .deep.near import VALUE", "deep/near.py"),
        ("pkg_k.deep", "from pkg_k import layers", "layers.py"),
        ("pkg_k", "from pkg_k import layers", "layers.py"),
        ("pkg_k.deep.mine", "", "__init__.py"),
        ("pkg_k.deep.mine", "", "deep/__init__.py"),
    ],
    ids=[
        "absolute",
        "relative from",
        "relative module",
        "dotted",
        "near",
        "deeper",
        "class in a subpackage",
        "class in the package",
        "the package's init",
        "the subpackage's init",
    ],
)
def test_all_that_is_imported_of_the_recipes_own_package_counts(
    beside: Path, module: str, statement: str, changed: str
) -> None:
    for name in ("__init__.py", "layers.py", "mine.py", "deep/__init__.py", "deep/near.py", "deep/mine.py"):
        path = beside / "pkg_k" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("VALUE = 1\n")
    place = module.replace(".", "/")
    place += "/__init__.py" if (beside / place).is_dir() else ".py"
    (beside / place).write_text(f"{statement}\n{GOOD}")
    assert changes_digest(beside, module, f"pkg_k/{changed}")


def test_a_built_in_recipe_does_not_depend_on_the_rest_of_the_library() -> None:
    """The library's arithmetic is named by the numerics version: else every release would retrain every model."""
    from training.recipes.digits import Digits
    from training.recipes.stdlib import ByteTransformer

    assert source_closure_digest(Digits()) != source_closure_digest(ByteTransformer())
