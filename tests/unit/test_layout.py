"""The traps of this layout: folders that must not shadow libraries, documents that must not name what is gone."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def test_importing_mlflow_gives_the_library() -> None:
    """From the project's root, where a folder mlflow/ lies."""
    code = "import mlflow; print(mlflow.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("3.")
    assert not list((ROOT / "mlflow").rglob("*.py"))


def test_deployments_name_the_flow_by_module_path() -> None:
    """A file entrypoint would put flows/ first on sys.path, where run.py or publish.py would shadow others."""
    document = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())
    named: dict[str, set[str]] = {}
    for each in document["deployments"]:
        named.setdefault(each["entrypoint"], set()).add(each["name"])
    assert named == {
        "flows.pipeline.pipeline": {"digits", "stdlib", "custom"},
        **{f"flows.lifecycle.{name}": {"models"} for name in ("promote", "rollback", "history")},
        "flows.predict.predict": {"models"},
    }


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    names = {path.stem for path in ROOT.glob("*/*.py") if path.parts[-2] in ("flows", "tasks", "training", "infra")}
    assert not names & (set(sys.stdlib_module_names) - {"__main__"})


def test_every_dependency_has_its_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = (ROOT / "docs/dependencies.md").read_text()
    names = [re.split(r"[<>=\[]", requirement)[0] for requirement in project["dependencies"]]
    assert [name for name in names if name not in told] == []


@pytest.mark.parametrize("document", ["README.md", "README.zh-CN.md", *sorted(p.name for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(document: str) -> None:
    path = next(p for p in (ROOT / document, ROOT / "docs" / document) if p.exists())
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    broken = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert broken == []


def test_readme_names_only_verbs_that_exist() -> None:
    from flows.cli import app

    verbs = set(re.findall(r"`?unbroken ([a-z]+)", (ROOT / "README.md").read_text()))
    assert verbs
    assert verbs <= {name for name in app if not name.startswith("-")}
