"""Where raw records come from: files on disk or in S3, listed in a fixed order and read as streams."""

from training.data.source.partition import (
    Partition,
    classes_of,
    content_digests,
    partition_fingerprint,
    partitions,
)
from training.data.source.places import Bucket, Folder, Source, SourceFile, open_source
from training.data.source.records import READING, content_of, read_records

__all__ = [
    "READING",
    "Bucket",
    "Folder",
    "Partition",
    "Source",
    "SourceFile",
    "classes_of",
    "content_digests",
    "content_of",
    "open_source",
    "partition_fingerprint",
    "partitions",
    "read_records",
]
