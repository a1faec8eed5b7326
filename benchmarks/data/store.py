"""The bench's own S3: SeaweedFS on loopback, on free ports, gone at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.data.contestants import s3
from infra.local.ports import INTERNAL, free_port
from infra.local.services import s3_service
from infra.settings import credentials_path

START_SECONDS = 60.0


@contextmanager
def running_store(home: Path) -> Iterator[int]:
    """Start it and point the environment at it. Gives its process id."""
    (home / "logs").mkdir(parents=True)
    service = s3_service(home, {name: free_port() for name in ("s3", *INTERNAL)})
    with (home / "logs" / "weed").open("w") as log:
        process = subprocess.Popen(service.command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not service.is_healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start: see {home / 'logs'}")
            time.sleep(0.2)
        _point_at(service.url, home)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _point_at(url: str, home: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        os.environ.pop(name, None)
    os.environ |= {
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials_path(home)),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": url,
        "S3_ENDPOINT_URL": url,
    }


def make_bucket(name: str) -> None:
    """A new bucket that has seen a PUT: the first one makes SeaweedFS open volumes, which takes about a second."""
    client = s3.client()
    client.create_bucket(Bucket=name)
    client.put_object(Bucket=name, Key="first", Body=bytes(8 << 20))
    client.delete_object(Bucket=name, Key="first")


def drop_bucket(name: str) -> None:
    client = s3.client()
    for key in s3.keys(name):
        client.delete_object(Bucket=name, Key=key)
    client.delete_bucket(Bucket=name)


def flip_byte(bucket: str, *, containing: str = "") -> str:
    """Change one byte in the middle of the bucket's largest object. Gives its key."""
    client: Any = s3.client()
    found = client.list_objects_v2(Bucket=bucket)["Contents"]
    key = str(max((item for item in found if containing in item["Key"]), key=lambda item: item["Size"])["Key"])
    body = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    client.put_object(Bucket=bucket, Key=key, Body=bytes(body))
    return key
