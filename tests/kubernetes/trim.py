"""Makes schemas.json: of the schemas that a cluster checks manifests by, what the tests need, without descriptions.

`python -m tests.kubernetes.trim FOLDER`, with these in the folder, under the names of SOURCES.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).parent / "schemas.json"
SOURCES = {
    "jobsets.yaml": "github.com/kubernetes-sigs/jobset v0.12.0, config/components/crd/bases/"
    "jobset.x-k8s.io_jobsets.yaml, Apache-2.0",
    "trainjobs.yaml": "github.com/kubeflow/trainer v2.3.0, manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml,"
    " Apache-2.0",
    "trainingruntimes.yaml": "github.com/kubeflow/trainer v2.3.0, manifests/base/crds/"
    "trainer.kubeflow.org_trainingruntimes.yaml, Apache-2.0",
    "clustertrainingruntimes.yaml": "github.com/kubeflow/trainer v2.3.0, manifests/base/crds/"
    "trainer.kubeflow.org_clustertrainingruntimes.yaml, Apache-2.0",
    "swagger.json": "github.com/kubernetes-client/python v36.0.3 (Kubernetes 1.36), kubernetes/"
    "swagger.json.unprocessed, Apache-2.0",
}
CORE = (
    "io.k8s.api.apps.v1.Deployment",
    "io.k8s.api.batch.v1.Job",
    "io.k8s.api.core.v1.Namespace",
    "io.k8s.api.core.v1.PodTemplateSpec",
    "io.k8s.api.core.v1.ServiceAccount",
    "io.k8s.api.networking.v1.NetworkPolicy",
    "io.k8s.api.rbac.v1.Role",
    "io.k8s.api.rbac.v1.RoleBinding",
)
METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
KEPT = {"x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"}


def main() -> None:
    folder = Path(sys.argv[1])
    definitions = core_definitions(json.loads((folder / "swagger.json").read_text())["definitions"])
    for kind, file in (("JobSet", "jobsets"), ("TrainJob", "trainjobs"), ("TrainingRuntime", "trainingruntimes")):
        definitions[kind] = custom_resource(folder / f"{file}.yaml")
    assert custom_resource(folder / "clustertrainingruntimes.yaml") == definitions["TrainingRuntime"]
    template = definitions["TrainingRuntime"]["properties"]["spec"]["properties"]["template"]["properties"]
    definitions["JobSetSpec"] = definitions["JobSet"]["properties"]["spec"]
    assert template["spec"] == definitions["JobSetSpec"], "Kubeflow was made for another JobSet"
    template["spec"] = definitions["JobSet"]["properties"]["spec"] = {"$ref": "#/definitions/JobSetSpec"}
    lines = [f"  {json.dumps(name)}: {_json(schema)}" for name, schema in sorted(definitions.items())]
    sources = json.dumps(list(SOURCES.values()), indent=2).replace("\n", "\n ")
    SCHEMAS.write_text(f'{{\n "sources": {sources},\n "definitions": {{\n' + ",\n".join(lines) + "\n }\n}\n")


def custom_resource(path: Path) -> dict[str, Any]:
    (version,) = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema = slim(version["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)
    schema["properties"]["metadata"] = {"$ref": f"#/definitions/{METADATA}"}
    return schema


def core_definitions(definitions: dict[str, Any]) -> dict[str, Any]:
    """Those of CORE, and what they refer to."""
    found: dict[str, Any] = {}
    waiting = [*CORE, METADATA]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = slim(definitions[name])
            if "spec" in found[name].get("properties", {}):
                found[name]["properties"].pop("status", None)
            waiting.extend(references(found[name]))
    return found


def references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str):
                yield value.removeprefix("#/definitions/")
            else:
                yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def slim(schema: Any, *, of_fields: bool = False) -> Any:
    """Without what says nothing of whether a document is valid. `of_fields`: the keys are names of fields."""
    if isinstance(schema, list):
        return [slim(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: slim(value, of_fields=key == "properties" and not of_fields)
        for key, value in schema.items()
        if of_fields or key in KEPT or not (key.startswith("x-kubernetes-") or key in ("description", "default"))
    }


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


if __name__ == "__main__":
    main()
