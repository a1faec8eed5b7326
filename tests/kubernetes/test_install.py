"""What is applied to a cluster once: access, network, the Prefect worker and its work pool; and the image."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from prefect.utilities.templating import apply_values

from infra.kubernetes.pods import LABELS, security_context
from infra.kubernetes.site import Site
from infra.settings import PROJECT_ROOT
from tests.kubernetes.strict import complaints

FOLDER = PROJECT_ROOT / "infra" / "kubernetes"
FILES = yaml.safe_load((FOLDER / "install" / "kustomization.yaml").read_text())["resources"]
SITE = Site(image="unbroken:1")


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "install" / file).read_text()))


def named(kind: str) -> dict[str, dict[str, Any]]:
    found = [document for file in FILES for document in documents(file) if document["kind"] == kind]
    return {document["metadata"]["name"]: document for document in found}


def test_every_file_is_installed() -> None:
    assert {*FILES, "kustomization.yaml"} == {path.name for path in (FOLDER / "install").iterdir()}


@pytest.mark.parametrize("file", FILES)
def test_the_schemas_have_no_complaint(file: str) -> None:
    assert [complaints(document) for document in documents(file)] == [[]] * len(documents(file))


def test_every_right_is_named_and_none_is_to_secrets() -> None:
    for role in named("Role").values():
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert not {"secrets", "pods/exec", "roles", "rolebindings"} & {*rule["resources"]}
    assert set(named("RoleBinding")) == set(named("Role"))
    for name, binding in named("RoleBinding").items():
        assert binding["roleRef"]["name"] == name
        (subject,) = binding["subjects"]
        assert subject["name"] in named("ServiceAccount")


def test_agents_have_an_account_without_rights() -> None:
    account = named("ServiceAccount")[SITE.service_account]
    assert account["automountServiceAccountToken"] is False
    bound = {subject["name"] for binding in named("RoleBinding").values() for subject in binding["subjects"]}
    assert SITE.service_account not in bound


def test_the_network_policy_is_that_of_the_agents() -> None:
    (policy,) = named("NetworkPolicy").values()
    assert policy["spec"]["podSelector"]["matchLabels"] == LABELS


def test_every_pod_keeps_to_the_restricted_standard() -> None:
    (worker,) = named("Deployment").values()
    for pod in (worker["spec"]["template"]["spec"], work_pool_job()["spec"]["template"]["spec"]):
        assert pod["securityContext"] == security_context()
        for container in pod["containers"]:
            own = container["securityContext"]
            assert (own["allowPrivilegeEscalation"], own["readOnlyRootFilesystem"]) == (False, True)
            assert own["capabilities"] == {"drop": ["ALL"]}


def work_pool() -> dict[str, Any]:
    return json.loads((FOLDER / "work-pool.json").read_text())


def work_pool_job() -> dict[str, Any]:
    """The job that Prefect's worker makes of the template, with the defaults."""
    variables = work_pool()["variables"]["properties"]
    values = {name: variable["default"] for name, variable in variables.items() if "default" in variable}
    values |= {"image": "unbroken:1", "name": "calm-otter", "command": "prefect flow-run execute"}
    job = apply_values(work_pool()["job_configuration"]["job_manifest"], values)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    container["args"] = container["args"].split()
    return job


def test_the_work_pool_makes_a_job_that_the_schema_takes() -> None:
    job = work_pool_job()
    pod = job["spec"]["template"]["spec"]
    # the worker of Prefect insists on these two, where Kubernetes knows them not, and drops them
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    assert complaints(job) == []
    assert pod["serviceAccountName"] in named("ServiceAccount")


def test_every_variable_of_the_work_pool_is_used_and_known() -> None:
    Draft202012Validator.check_schema(work_pool()["variables"])
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(work_pool()["job_configuration"])))
    assert used == set(work_pool()["variables"]["properties"])


def test_the_image_holds_every_package_and_runs_as_the_pods_user() -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text()
    wheel = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = set(re.findall(r"^COPY (\w+) \1$", dockerfile, re.MULTILINE))
    assert copied == set(wheel["packages"])
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE):
        assert all(Path(PROJECT_ROOT, name).exists() for name in line.split())
    users = security_context()
    assert f"USER {users['runAsUser']}:{users['runAsGroup']}" in dockerfile.splitlines()
    kept = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{package}" for package in wheel["packages"]} <= set(kept)
