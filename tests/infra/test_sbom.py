"""The bill of materials names what is installed, in the pinned versions."""

from __future__ import annotations

import sysconfig
from importlib.metadata import distributions, version

from infra.sbom import bill


def test_the_bill_names_every_package_once_and_what_it_needs() -> None:
    path = [sysconfig.get_path("purelib")]  # other tests import from elsewhere, too
    made = bill(distributions(path=path))
    components = {component["name"]: component for component in made["components"]}
    assert components["torch"]["purl"] == f"pkg:pypi/torch@{version('torch')}"
    assert made["metadata"]["component"]["name"] == "unbroken"
    references = [component["bom-ref"] for component in made["components"]]
    assert len(references) == len(set(references))
    needs = {one["ref"]: one["dependsOn"] for one in made["dependencies"]}
    ours = needs[made["metadata"]["component"]["bom-ref"]]
    assert components["torch"]["bom-ref"] in ours
    assert set(references) >= {one for needed in needs.values() for one in needed}
    assert bill(distributions(path=path)) == made
