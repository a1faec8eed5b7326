"""boto3's clients for one endpoint: slow to make, so each is made when first used, and shared by threads."""

from __future__ import annotations

import threading
from functools import cache, cached_property
from typing import TYPE_CHECKING

from training.s3.quickrequests import CONNECT_SECONDS, READ_SECONDS

if TYPE_CHECKING:
    from boto3.session import Session
    from botocore.credentials import Credentials
    from botocore.loaders import Loader
    from mypy_boto3_s3 import S3Client

_SESSION_LOCK = threading.Lock()
"""Clients are safe to share between threads, what makes them is not."""


@cache
def _api() -> Loader:
    """What S3's API is: it takes longer to read than anything else that clients are made of, so it is read once."""
    import botocore.session

    loader: Loader = botocore.session.Session().get_component("data_loader")
    return loader


def read_api_ahead() -> None:
    """Read what every client needs, for processes that are forked from this one. Connects to nothing."""
    session = Clients(endpoint=None, region="us-east-1").session
    session.client("s3", aws_access_key_id="none", aws_secret_access_key="none")  # nosec B106 # asks for nothing


class Clients:
    """Without an endpoint, AWS is meant. Credentials come from the standard chain."""

    def __init__(self, *, endpoint: str | None, region: str) -> None:
        self._endpoint = endpoint
        self._region = region

    @cached_property
    def patient(self) -> S3Client:
        """Asks again by itself."""
        return self._make(num_attempts=5)

    @cached_property
    def impatient(self) -> S3Client:
        """Asks once, for what must not be asked twice."""
        return self._make(num_attempts=1)

    @cached_property
    def session(self) -> Session:
        """What the clients share."""
        import boto3
        import botocore.session

        session = botocore.session.Session()
        session.register_component("data_loader", _api())
        return boto3.session.Session(botocore_session=session, region_name=self._region)

    @cached_property
    def credentials(self) -> Credentials | None:
        """For requests that no client makes: the session that makes clients takes longer to make than they all do."""
        import botocore.session

        with _SESSION_LOCK:
            return botocore.session.Session().get_credentials()

    def _make(self, *, num_attempts: int) -> S3Client:
        from botocore.config import Config

        config = Config(
            retries={"mode": "standard", "total_max_attempts": num_attempts},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            s3={"addressing_style": "path"} if self._endpoint else {},
        )
        with _SESSION_LOCK:
            return self.session.client("s3", endpoint_url=self._endpoint, config=config)
