"""A version with its bytes in memory, proven: what replicas load, also one that starts while the store is away."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from tasks.lifecycle import model_file
from tasks.lifecycle.model_file import KeptVersion
from training.s3.objectstore import Store


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The file is one without a name, which the kernel frees with the last who holds it open."""

    kept: KeptVersion
    descriptor: int

    @property
    def identity(self) -> str:
        return self.kept.identity

    def told(self) -> dict[str, Any]:
        """For a replica, which proves the bytes once more."""
        return {
            "do": "load",
            "identity": self.identity,
            "version": self.kept.version,
            "sha256": self.kept.model_sha256,
            "signature": asdict(self.kept.signature),
            "path": f"/proc/{os.getpid()}/fd/{self.descriptor}",
        }

    def close(self) -> None:
        os.close(self.descriptor)


def fetch(store: Store, kept: KeptVersion) -> Offer:
    """Raises `DamagedError` if the file is missing or damaged, `InfrastructureError` if the store is away."""
    data = model_file.prove(store, kept)
    descriptor = os.memfd_create(f"model-{kept.version}")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(data)
    return Offer(kept=kept, descriptor=descriptor)
