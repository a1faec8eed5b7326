"""`unbroken runs render`: what it prints is a run that pods train to its end, and wrong input is named."""

from __future__ import annotations

import configparser
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.kubernetes.manifests import PREEMPTED
from tests.cli.commands import complaint, unbroken
from tests.conftest import Stack
from tests.flows.runs import at_leisure_while
from tests.kubernetes.pod import Pod, require_pods, start
from tests.kubernetes.strict import complaints, pod_templates
from tests.waiting import wait_until
from training.runs.record import RunRecord

IMAGE = ("--image", "registry.example.org/unbroken:0.1.0")
SECRET_NAMES = ("aws_access_key_id", "aws_secret_access_key")


def shared(stack: Stack) -> dict[str, str]:
    """The stack's store, named as one that a cluster shares."""
    assert stack.settings.s3_endpoint is not None
    return {"UNBROKEN_S3_ENDPOINT": stack.settings.s3_endpoint}


def secret(stack: Stack) -> dict[str, str]:
    file = configparser.ConfigParser()
    file.read(stack.home / "credentials")
    return {name.upper(): file["default"][name] for name in SECRET_NAMES}


def render(stack: Stack, *arguments: str) -> list[dict[str, Any]]:
    done = unbroken(stack, "runs", "render", "digits", *IMAGE, *arguments, variables=shared(stack))
    assert done.returncode == 0, done.stderr
    for value in secret(stack).values():
        assert value not in done.stdout
    if "--json" in arguments:
        return json.loads(done.stdout)["items"]
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture
def begin(stack: Stack, tmp_path: Path) -> Iterator[Callable[[dict[str, Any], int], Pod]]:
    """Starts pods of a template, which are gone at the end."""
    require_pods()
    started: list[Pod] = []

    def start_one(template: dict[str, Any], index: int) -> Pod:
        started.append(start(template, index=index, secret=secret(stack), log=tmp_path / f"pod{index}.log"))
        return started[-1]

    yield start_one
    for pod in started:
        pod.process.kill()
        pod.process.wait(timeout=120)


@pytest.fixture
def slow() -> Iterator[Path]:
    """While it is there, training takes its time. Every pod has a /tmp of its own, but this one they see."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        file = Path(folder) / "slow"
        file.touch()
        yield file


@pytest.mark.slow
def test_pods_train_what_was_rendered_and_a_preempted_one_comes_back(
    stack: Stack, begin: Callable[[dict[str, Any], int], Pod], slow: Path
) -> None:
    (manifest,) = render(stack, "--kind", "JobSet", "--set", "train.steps=200", *at_leisure_while(slow))
    assert complaints(manifest) == []
    (template,) = pod_templates(manifest)
    run = RunRecord(stack.store, manifest["metadata"]["annotations"]["unbroken/run-key"])
    pods = [begin(template, 0), begin(template, 1)]
    wait_until(lambda: _trains_with(run, num_nodes=2), what="both pods to train")
    pods[1].evict()
    assert pods[1].exit_code() in PREEMPTED, pods[1].log.read_text()
    slow.unlink()
    pods[1] = begin(template, 1)
    assert [pod.exit_code() for pod in pods] == [0, 0], pods[0].log.read_text() + pods[1].log.read_text()
    record = run.read()
    assert record.result is not None
    assert record.result.step == 200
    assert {departure.node for departure in record.departures} >= {1}


def _trains_with(run: RunRecord, *, num_nodes: int) -> bool:
    record = run.read()
    return bool(record.token) and record.num_nodes == num_nodes


def test_a_trainjob_comes_after_its_runtime(stack: Stack) -> None:
    manifests = render(stack, "--namespace", "team", "--json")
    assert [manifest["kind"] for manifest in manifests] == ["TrainingRuntime", "TrainJob"]
    assert [complaints(manifest) for manifest in manifests] == [[], []]
    assert {manifest["metadata"]["namespace"] for manifest in manifests} == {"team"}
    assert manifests[1]["spec"]["trainer"]["numNodes"] == 2


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (("digits", "--image", "unbroken"), {}, "image = 'unbroken' must name a version"),
        (("digits", *IMAGE, "--namespace", "Team"), {}, "namespace = 'Team' must be lowercase"),
        (("digit", *IMAGE), {}, "no preset 'digit'"),
        (("digits", *IMAGE), {"UNBROKEN_S3_ENDPOINT": ""}, "is the local stack's, which no pod can reach"),
    ],
)
def test_what_cannot_be_rendered_is_named(
    stack: Stack, arguments: tuple[str, ...], variables: Mapping[str, str], says: str
) -> None:
    done = unbroken(stack, "runs", "render", *arguments, variables={**shared(stack), **variables})
    assert says in complaint(done)
