"""The manifests of a job: valid by the cluster's own schemas, to the last field; and they say what was meant."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from infra.kubernetes.manifests import FAILED_FOR_GOOD, PREEMPTED, jobset, train_job, training_runtime
from infra.kubernetes.site import MAX_NODES, Site, job_name
from infra.launcher import JobSpec, Needs
from tests.kubernetes.strict import complaints, pod_templates
from training.cluster.agent import EXIT_PREEMPTED
from training.errors import UserError
from training.runs.job import agent_command, agent_environment, location_from
from training.s3.objectstore import StoreLocation

Manifest = dict[str, Any]
SITE = Site(image="registry.example.org:5000/unbroken:0.1.0")
LOCATION = StoreLocation(endpoint="https://s3.example.org", bucket="ml", prefix="team/", region="eu-central-1")


def a_job(**changes: Any) -> JobSpec:
    values = {
        "key": "0123456789abcdef" * 4,
        "num_nodes": 4,
        "command": agent_command("0123456789abcdef" * 4, "fedcba98" * 8),
        "environment": agent_environment(LOCATION),
        **changes,
    }
    return JobSpec(**values)


SMALL = a_job()
LARGE = a_job(
    needs=Needs(num_cpus=8, memory_bytes=64 * 2**30, num_gpus=2, priority="urgent"), owner="flow-run", generation=3
)
MANIFESTS = {
    "jobset": jobset(SITE, SMALL, grace_seconds=10),
    "large jobset": jobset(SITE, LARGE, grace_seconds=99.5),
    "trainjob": train_job(SITE, SMALL, grace_seconds=10),
    "large trainjob": train_job(SITE, LARGE, grace_seconds=99.5),
    "trainjob of a cluster's runtime": train_job(SITE, LARGE, grace_seconds=99.5, of_cluster=True),
    "runtime": training_runtime(SITE),
    "urgent runtime": training_runtime(SITE, priority="urgent"),
    "cluster's runtime": training_runtime(SITE, of_cluster=True),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_schemas_have_no_complaint(name: str) -> None:
    assert complaints(MANIFESTS[name]) == []


def _job(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]["template"]["spec"] if "template" in manifest["spec"] else manifest["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"]


def _pod(manifest: Manifest) -> Manifest:
    return _job(manifest)["template"]["spec"]


DAMAGES: dict[str, tuple[str, Callable[[Manifest], object], str]] = {
    "unknown field of a spec": ("jobset", lambda m: m["spec"].update(failurePolice={}), "failurePolice"),
    "unknown field of a job": ("jobset", lambda m: _job(m).update(backoffLimitPerPod=1), "backoffLimitPerPod"),
    "unknown field of a pod": ("jobset", lambda m: _pod(m).update(gracePeriod=1), "gracePeriod"),
    "unknown field of a container": ("runtime", lambda m: _pod(m)["containers"][0].update(cmd=[]), "cmd"),
    "unknown field of a variable": (
        "jobset",
        lambda m: _pod(m)["containers"][0]["env"][0].update(val="x"),
        "val",
    ),
    "unknown field of metadata": ("trainjob", lambda m: m["metadata"].update(label={}), "label"),
    "unknown field of a trainer": ("trainjob", lambda m: m["spec"]["trainer"].update(numNode=2), "numNode"),
    "unknown field of a patch": (
        "trainjob",
        lambda m: m["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0][
            "template"
        ]["spec"]["template"]["spec"].update(priorityClassName="urgent"),
        "priorityClassName",
    ),
    "text for a number": ("trainjob", lambda m: m["spec"]["trainer"].update(numNodes="two"), "'two' is not of type"),
    "number for a text": (
        "jobset",
        lambda m: _pod(m)["containers"][0]["env"].append({"name": "A", "value": 1}),
        "1 is not of type 'string'",
    ),
    "no such choice": ("jobset", lambda m: m["spec"]["failurePolicy"].update(restartStrategy="Gently"), "'Gently'"),
    "nothing to refer to": ("trainjob", lambda m: m["spec"].pop("runtimeRef"), "'runtimeRef' is a required property"),
    "a container without a name": ("runtime", lambda m: _pod(m)["containers"][0].pop("name"), "'name' is a required"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_schemas_refuse(damage: str) -> None:
    name, spoil, says = DAMAGES[damage]
    manifest = copy.deepcopy(MANIFESTS[name])
    spoil(manifest)
    assert any(says in complaint for complaint in complaints(manifest)), complaints(manifest)


def test_the_trainer_makes_the_jobset_of_a_trainjob() -> None:
    """A model of what Kubeflow's trainer 2.3 does, read from its source: the two ways may not differ in a pod."""
    for spec in (SMALL, LARGE):
        runtime = training_runtime(SITE, priority=spec.needs.priority)
        asked = train_job(SITE, spec, grace_seconds=45)["spec"]
        assert asked["runtimeRef"]["name"] == runtime["metadata"]["name"]
        made = copy.deepcopy(runtime["spec"]["template"]["spec"])
        job = made["replicatedJobs"][0]["template"]["spec"]
        container = job["template"]["spec"]["containers"][0]
        job["completions"] = job["parallelism"] = asked["trainer"]["numNodes"]
        container |= {"image": asked["trainer"]["image"], "command": asked["trainer"]["command"]}
        container["env"] += asked["trainer"]["env"]
        if "resourcesPerNode" in asked["trainer"]:
            container["resources"] = asked["trainer"]["resourcesPerNode"]
        (patch,) = asked["runtimePatches"]
        (patched,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        assert patched["name"] == made["replicatedJobs"][0]["name"]
        job["template"]["spec"] |= patched["template"]["spec"]["template"]["spec"]
        wanted = jobset(SITE, spec, grace_seconds=45)["spec"]
        del wanted["ttlSecondsAfterFinished"]
        assert made == wanted


def test_an_agent_is_replaced_alone_and_only_when_it_should_be() -> None:
    manifest = MANIFESTS["jobset"]
    job = _job(manifest)
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 0}
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    actions = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in job["podFailurePolicy"]["rules"]]
    assert actions == [("FailJob", FAILED_FOR_GOOD), ("Ignore", PREEMPTED), ("Ignore", None)]
    assert FAILED_FOR_GOOD == [2, 4]
    assert PREEMPTED == [EXIT_PREEMPTED]


def test_what_the_api_server_asks_beyond_the_schemas() -> None:
    for name in ("jobset", "large jobset", "runtime", "urgent runtime"):
        job, pod = _job(MANIFESTS[name]), _pod(MANIFESTS[name])
        assert pod["restartPolicy"] == "Never"  # with podFailurePolicy and backoffLimitPerIndex
        assert job["podReplacementPolicy"] == "Failed"  # with podFailurePolicy
        containers = {container["name"] for container in pod["containers"]}
        volumes = {volume["name"] for volume in pod["volumes"]}
        for rule in job["podFailurePolicy"]["rules"]:
            if "onExitCodes" in rule:
                assert rule["onExitCodes"]["containerName"] in containers
                assert sorted(set(rule["onExitCodes"]["values"]) - {0}) == rule["onExitCodes"]["values"]
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            names = [variable["name"] for variable in container["env"]]
            assert len(set(names)) == len(names)


def test_the_longest_name_of_a_pod_can_be_a_host() -> None:
    name = job_name(a_job(num_nodes=MAX_NODES, generation=999))
    assert len(f"{name}-node-0-{MAX_NODES - 1}-abcde") <= 63
    assert name == job_name(a_job(num_nodes=1, generation=999))
    assert len({name, job_name(a_job(generation=1)), job_name(a_job(key="f" * 64, generation=999))}) == 3


def test_a_pod_may_nothing() -> None:
    (template,) = pod_templates(MANIFESTS["large jobset"])
    pod = template["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert container["envFrom"] == [{"secretRef": {"name": "unbroken-s3", "optional": True}}]
    assert not any("KEY" in variable["name"] for variable in container["env"])


def test_an_agent_is_told_what_it_needs() -> None:
    (template,) = pod_templates(MANIFESTS["large jobset"])
    (container,) = template["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "training.cluster.agent"]
    assert container["command"][3] == "$(JOB_COMPLETION_INDEX)"
    plain = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    assert location_from(plain) == LOCATION
    assert container["resources"]["limits"] == {"cpu": "8", "memory": str(64 * 2**30), "nvidia.com/gpu": "2"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert template["spec"]["priorityClassName"] == "urgent"
    assert template["spec"]["terminationGracePeriodSeconds"] > math.ceil(99.5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"needs": Needs(priority="Very High")}, "launch.priority = 'Very High' must be the name of a PriorityClass"),
        ({"num_nodes": MAX_NODES + 1}, f"launch.nodes = {MAX_NODES + 1} must be at most {MAX_NODES}"),
    ],
)
@pytest.mark.parametrize("make", [jobset, train_job])
def test_a_job_that_a_cluster_would_refuse_is_named(
    make: Callable[..., Manifest], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(says)}"):
        make(SITE, a_job(**changes), grace_seconds=10)


@pytest.mark.parametrize(
    "image", ["unbroken", "unbroken:latest", "registry:5000/unbroken", "a b:1", "", ":1", "x@sha256:12", "u:1 --bad"]
)
def test_an_image_without_a_version_is_refused(image: str) -> None:
    with pytest.raises(UserError, match="must name a version"):
        Site(image=image)


@pytest.mark.parametrize("image", ["unbroken:0.1.0", "registry:5000/team/unbroken:v1", f"unbroken@sha256:{'0' * 64}"])
def test_an_image_with_a_version_is_taken(image: str) -> None:
    assert Site(image=image).image == image


@pytest.mark.parametrize("field", ["namespace", "service_account", "secret"])
def test_a_name_that_kubernetes_would_refuse_is_refused(field: str) -> None:
    with pytest.raises(UserError, match=f"^{field} = 'Team_A' must be lowercase"):
        Site(**{"image": "unbroken:1", field: "Team_A"})
