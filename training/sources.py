"""Where a recipe's source lies: imported from a preset's folder, or found without importing, and digested."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from training.documents import digest_of, sha256_hex
from training.errors import UnbrokenError, UserError

Find = Callable[[str], ModuleSpec | None]
SETTLED_SECONDS = 2.0
_PARSING = threading.Lock()
"""Python's parser counts its depth for all threads together, and two at once can make it fail (CPython #106905)."""


def import_recipe(recipe: str, folder: str) -> Any:
    """What a preset of `folder` names as its recipe. Raises `UserError`."""
    module_name, class_name = recipe.split(":")
    _look_beside(folder)
    try:
        module = importlib.import_module(module_name)
    except UnbrokenError:
        raise
    except ModuleNotFoundError as error:
        where = f" beside {folder}" if folder else ""
        raise UserError(
            f"recipe = {recipe!r}: no module {error.name!r}{where} or among the installed packages"
        ) from error
    except Exception as error:
        raise UserError(f"recipe = {recipe!r}: importing it failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, class_name):
        raise UserError(f"recipe = {recipe!r}: module {module_name!r} has no class {class_name!r}")
    return getattr(module, class_name)


_folders: list[str] = []
"""Presets' folders that were put on sys.path here: the last one only."""


def _look_beside(folder: str) -> None:
    """Let modules be found in a preset's folder, and forget those of another preset's: both may have a `recipe.py`."""
    if not folder or folder in sys.path:
        return
    while _folders:
        other = _folders.pop()
        if other in sys.path:
            sys.path.remove(other)
        for name, module in list(sys.modules.items()):
            file = Path(getattr(module, "__file__", None) or "/")
            depth = name.count(".") + (file.name == "__init__.py")
            if list(file.parents)[depth : depth + 1] == [Path(other)]:  # found there, not in a .venv below
                del sys.modules[name]
    sys.path.append(folder)
    _folders.append(folder)
    importlib.invalidate_caches()


def source_closure_digest(recipe: object) -> str:
    """A digest over the recipe's source and every module of its own package that it imports, transitively.

    Code outside the recipe's top-level package (or folder) is not part of it: libraries are named by the
    environment fingerprint, and this library's arithmetic by the numerics version.
    """
    return module_closure_digest(type(recipe).__module__)


def module_closure_digest(module_name: str) -> str:
    """The same for an imported module that defines a recipe."""
    return digest_of({name: sha256 for name, (_, sha256) in _module_closure(module_name).items()})


def source_closure(recipe: object) -> dict[str, Path]:
    """The files whose bytes that digest is of, by the name of the module."""
    return {name: path for name, (path, _) in _module_closure(type(recipe).__module__).items()}


def closure_without_import(recipe: str, folder: str) -> dict[str, Path]:
    """The files that `source_closure` would give once a preset of `folder` has imported its recipe, but nothing of them
    is run. Empty if there is no such module."""
    name = recipe.partition(":")[0]
    spec = find_module(name, folder)
    if spec is None or spec.origin is None:
        return {}
    found = _closure_of(name, Path(spec.origin), partial(find_module, folder=folder))
    return {name: path for name, (path, _) in found.items()}


def find_module(name: str, folder: str) -> ModuleSpec | None:
    """Where a preset of `folder` would find a module. `importlib.util.find_spec` runs its package for that."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module that was made, not found
        spec = None
    if spec is None or _is_of_another_preset(spec, folder):
        spec = PathFinder.find_spec(top, [folder]) if folder else None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def _is_of_another_preset(spec: ModuleSpec, folder: str) -> bool:
    parents = [str(parent) for parent in Path(spec.origin or "/").parents[:2]]
    return any(other in parents for other in _folders if other != folder)


def _module_closure(module_name: str) -> dict[str, tuple[Path, str]]:
    """Each module's file and its sha256."""
    module = sys.modules[module_name]
    assert module.__file__ is not None
    return _closure_of(module.__name__, Path(module.__file__), importlib.util.find_spec)


def _closure_of(name: str, path: Path, find: Find) -> dict[str, tuple[Path, str]]:
    depth = name.count(".") - (path.name != "__init__.py")
    root = path.parent if name.startswith("training.") else path.parents[max(0, depth)]
    found: dict[str, tuple[Path, str]] = {}
    _collect(name, root, found, find)
    return found


def _collect(name: str, root: Path, found: dict[str, tuple[Path, str]], find: Find) -> None:
    package = name.rpartition(".")[0]
    if package:  # importing a.b runs a/__init__.py too
        _collect(package, root, found, find)
    spec = find(name)
    if spec is None or spec.origin is None or name in found:
        return
    path = Path(spec.origin)
    if root not in path.parents or path.suffix != ".py":
        return
    sha256, imports = _read_source(path, package=spec.parent or "")
    found[name] = path, sha256
    for imported in imports:
        try:
            _collect(imported, root, found, find)
        except (ImportError, ValueError):  # an attribute of a module, not a module
            continue


def _read_source(path: Path, *, package: str) -> tuple[str, Sequence[str]]:
    """The digest of a module, and what it imports; as it was, if the file was not touched since."""
    about = path.stat()
    is_settled = time.time() - about.st_mtime > SETTLED_SECONDS  # else it may change and keep its time
    read = _source if is_settled else _source.__wrapped__
    return read(path, package, (about.st_mtime_ns, about.st_ctime_ns, about.st_size, about.st_ino))


@cache
def _source(path: Path, package: str, version: tuple[int, ...]) -> tuple[str, Sequence[str]]:
    source = path.read_bytes()
    with _PARSING:
        tree = ast.parse(source)
    return sha256_hex(source), tuple(_imports(tree, package=package))


def _imports(tree: ast.AST, *, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package) if node.level else base
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
