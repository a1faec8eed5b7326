"""What the errors of an S3 store mean here, and who must act."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from training.errors import InfrastructureError, MissingError, UnbrokenError, UserError

if TYPE_CHECKING:
    from training.s3.objectstore import StoreLocation


@contextmanager
def typed_errors(location: StoreLocation, key: str) -> Iterator[None]:
    """Turns botocore's errors inside a `with` into ours, which name the object."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise translated(error, location, key) from error


def translated(error: Exception, location: StoreLocation, key: str) -> UnbrokenError:
    uri, store = location.uri(key), location.endpoint or "AWS"
    response: dict[str, Any] = getattr(error, "response", None) or {}  # None, of a connection that was closed
    code = str(response.get("Error", {}).get("Code", type(error).__name__))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return UserError(f"bucket {location.bucket!r} does not exist at {store}")
    if code == "ParamValidationError":
        return UserError(f"{uri}: {' '.join(str(error).split())}")
    if status == 412:
        return UserError(f"{uri} was replaced while it was read: start again once nobody writes there")
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingError(f"{uri} does not exist")
    if status in (401, 403) or code in ("NoCredentialsError", "PartialCredentialsError"):
        return UserError(
            f"no permission for {uri} ({code}): check the credentials (AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or AWS_SHARED_CREDENTIALS_FILE) and the bucket's policy"
        )
    return InfrastructureError(f"{uri}: the store at {store} failed ({code}): {error}")


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
