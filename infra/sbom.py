"""`python -m infra.sbom`: what this environment is made of, as a CycloneDX 1.6 document. https://cyclonedx.org"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from typing import Any

PROJECT = "unbroken"


def bill(installed: Iterable[Distribution]) -> dict[str, Any]:
    """Every installed distribution by name and version, and which one needs which. The same environment gives the same
    document."""
    found: dict[str, Distribution] = {}
    for one in installed:
        found.setdefault(_name(one.metadata["Name"]), one)  # Python imports the first
    made = {name: _reference(name, one) for name, one in sorted(found.items())}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _component(PROJECT, found[PROJECT])},
        "components": [_component(name, found[name]) for name in made if name != PROJECT],
        "dependencies": [
            {"ref": reference, "dependsOn": sorted({made[need] for need in _needs(found[name]) if need in made})}
            for name, reference in made.items()
        ],
    }


def _component(name: str, one: Distribution) -> dict[str, Any]:
    reference = _reference(name, one)
    made = {"type": "library", "bom-ref": reference, "name": name, "version": one.version, "purl": reference}
    licence = next(iter(one.metadata.get_all("License-Expression") or ()), None)
    return made | ({"licenses": [{"expression": licence}]} if licence else {})


def _reference(name: str, one: Distribution) -> str:
    return f"pkg:pypi/{name}@{one.version}"


def _needs(one: Distribution) -> list[str]:
    """By name; those of extras too, where they are installed."""
    return [_name(re.split(r"[^\w.-]", need, maxsplit=1)[0]) for need in one.requires or ()]


def _name(name: str) -> str:
    """As package indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    json.dump(bill(distributions()), sys.stdout, indent=1)
    print()
