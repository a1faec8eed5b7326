"""What the errors of an S3 store mean here, and who must act."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

from training.errors import InfrastructureError, MissingError, UnbrokenError, UserError

if TYPE_CHECKING:
    from training.s3.objectstore import StoreLocation

EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
"""What a store says of credentials that were good for a while."""


def has_expired(error: Exception) -> bool:
    """Whether the credentials were good for a while only: the next ones may do."""
    return _code(error) in EXPIRED


@contextmanager
def typed_errors(translate: Callable[[Exception], UnbrokenError]) -> Iterator[None]:
    """Turns botocore's errors inside a `with` into ours."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise translate(error) from error


def translated(error: Exception, location: StoreLocation, key: str) -> UnbrokenError:
    """Ours, which names the object."""
    uri, store = location.uri(key), location.endpoint or "AWS"
    reply = _response(error).get("ResponseMetadata", {})
    code, status = _code(error), reply.get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return UserError(f"bucket {location.bucket!r} does not exist at {store}")
    if code == "ParamValidationError":
        return UserError(f"{uri}: {' '.join(str(error).split())}")
    if status == 412:
        return UserError(f"{uri} was replaced while it was read: start again once nobody writes there")
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingError(f"{uri} does not exist")
    if has_expired(error):
        return InfrastructureError(
            f"{uri}: the session token has expired ({code}): renew it. From a file or a service"
            " (AWS_SHARED_CREDENTIALS_FILE, `aws sso login`, a role) the new one is taken up by itself; one in"
            " AWS_SESSION_TOKEN stays as it is, so set another and start again"
        )
    if code == "RequestTimeTooSkewed":
        here = format_datetime(datetime.now(UTC), usegmt=True)
        there = reply.get("HTTPHeaders", {}).get("date", "another time")
        return InfrastructureError(
            f"{uri}: this machine's clock is too far from that of the store at {store} ({code}): here it is {here},"
            f" there {there}. Set the one that is wrong (`timedatectl set-ntp true`)"
        )
    if status in (401, 403) or code in ("NoCredentialsError", "PartialCredentialsError"):
        return UserError(
            f"no permission for {uri} ({code}): check the credentials (AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or AWS_SHARED_CREDENTIALS_FILE) and the bucket's policy"
        )
    return InfrastructureError(f"{uri}: the store at {store} failed ({code}): {error}")


def _response(error: Exception) -> dict[str, Any]:
    found: dict[str, Any] = getattr(error, "response", None) or {}  # None, of a connection that was closed
    return found


def _code(error: Exception) -> str:
    """What the store calls it, or else botocore."""
    return str(_response(error).get("Error", {}).get("Code", type(error).__name__))


def ignores(location: StoreLocation, feature: str) -> UserError:
    """Of a store that no protocol can be built on."""
    return UserError(
        f"the store at {location.endpoint or 'AWS'} ignores {feature}: two runs could overwrite one"
        " another there. Use one that honours them (AWS S3, SeaweedFS >= 4, MinIO)"
    )


def cut_short() -> tuple[type[Exception], ...]:
    """The errors of a body that ended too soon."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    return (IncompleteReadError, ResponseStreamingError, ReadTimeoutError)
