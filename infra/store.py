"""Where the settings say the object store is."""

from __future__ import annotations

from infra.settings import Settings
from training.s3.objectstore import StoreLocation


def store_location(settings: Settings) -> StoreLocation:
    return StoreLocation(
        endpoint=settings.s3_endpoint,
        bucket=settings.s3_bucket,
        prefix=settings.s3_prefix,
        region=settings.s3_region,
    )
