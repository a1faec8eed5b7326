"""Storage that refuses us or is not there: said before anything is launched. And a prefix of one's own is a border."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from tests.cli.commands import complaint, unbroken
from tests.conftest import Stack
from tests.unit.tiny import Tiny
from training.config import DataConfig
from training.data.source import open_source
from training.data.writer import write_dataset
from training.s3.objectstore import Store, StoreLocation


@pytest.mark.usefixtures("nothing_launched")
def test_wrong_credentials_are_refused(stack: Stack) -> None:
    assert stack.settings.s3_endpoint is not None
    done = unbroken(
        stack,
        *("run", "digits"),
        variables={
            "UNBROKEN_S3_ENDPOINT": stack.settings.s3_endpoint,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
        },
    )
    line = complaint(done)
    assert "no permission for s3://unbroken/" in line
    assert "AWS_ACCESS_KEY_ID" in line


@pytest.mark.usefixtures("nothing_launched")
def test_missing_bucket_is_refused_and_not_made(stack: Stack) -> None:
    name = f"missing-{uuid.uuid4().hex[:8]}"
    line = complaint(unbroken(stack, "run", "digits", variables={"UNBROKEN_S3_BUCKET": name}))
    assert f"bucket '{name}' does not exist" in line
    assert not _bucket_exists(stack, name)


@pytest.mark.usefixtures("nothing_launched")
def test_source_in_a_missing_bucket_is_refused(stack: Stack) -> None:
    name = f"missing-{uuid.uuid4().hex[:8]}"
    line = complaint(unbroken(stack, "run", "digits", "--set", f"data.source=s3://{name}/raw"))
    assert f"bucket '{name}' does not exist" in line


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8333", "nonsense"])
def test_endpoint_that_is_no_url_is_refused_by_name(stack: Stack, endpoint: str) -> None:
    line = complaint(unbroken(stack, "data", "ls", variables={"UNBROKEN_S3_ENDPOINT": endpoint}))
    assert endpoint in line


def test_own_prefix_in_a_shared_bucket_shows_only_what_is_mine(stack: Stack, tmp_path: Path) -> None:
    team = f"team-{uuid.uuid4().hex[:8]}"
    for prefix, name in ((team, "mine"), (f"{team}-longer", "longer"), (f"other/{team}", "deeper")):
        _write_dataset(stack, tmp_path, prefix=f"{prefix}/", name=name)
    assert stack.settings.s3_endpoint is not None
    external = {"UNBROKEN_S3_ENDPOINT": stack.settings.s3_endpoint, "UNBROKEN_S3_BUCKET": stack.location.bucket}
    listed = {}
    for prefix in (team, f"{team}-longer"):
        done = unbroken(stack, "data", "ls", "--json", variables={**external, "UNBROKEN_S3_PREFIX": prefix})
        assert done.returncode == 0, done.stderr
        listed[prefix] = [(row["name"], row["train"] + row["test"]) for row in json.loads(done.stdout)]
    assert listed == {team: [("mine", 40)], f"{team}-longer": [("longer", 40)]}


def _write_dataset(stack: Stack, folder: Path, *, prefix: str, name: str) -> None:
    (folder / "tiny.csv").write_text("".join(f"{n},{n},{n},{n},{n},{n % 3}\n" for n in range(40)))
    config = DataConfig(name=name, source="tiny.csv", format="csv")
    location = StoreLocation(endpoint=stack.location.endpoint, bucket=stack.location.bucket, prefix=prefix)
    source = open_source(config, folder=str(folder), location=location)
    write_dataset(Store(location), source, config, Tiny())


def _bucket_exists(stack: Stack, name: str) -> bool:
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.client("s3", endpoint_url=stack.settings.s3_endpoint, region_name="us-east-1")
    try:
        client.head_bucket(Bucket=name)
    except ClientError:
        return False
    return True
