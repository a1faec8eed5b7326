"""The ledger: what was read in each step, small enough to travel with the gradients, checked against the order later.

Each virtual worker digests the ids that it found in its decoded records. The sixteen bytes of the digest are added to
the vector that the step's reduction sums anyway: sums of up to 2^16 bytes are exact in float32. So rank 0 has the sum
of all digests without a message more, and notes it beside the step's loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from training.data.order import Order

NUM_ENTRIES = 16
MAX_VIRTUAL_WORKERS = 1 << 16


def entries(worker: int, ids: Iterable[str]) -> NDArray[np.float32]:
    """What a virtual worker adds to the sum of a step, shape [16], each from 0 to 255. Order and place count."""
    digest = xxhash.xxh3_128(f"{worker}".encode())
    for sample_id in ids:
        data = sample_id.encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return np.frombuffer(digest.digest(), dtype=np.uint8).astype(np.float32)


def seal(sums: NDArray[np.float32]) -> str:
    """The line of a step in the ledger, from the sum of all virtual workers' entries."""
    return xxhash.xxh3_64_hexdigest(np.asarray(sums, dtype=np.int64).tobytes())


def expected(order: Order, ids: Sequence[str]) -> str:
    """The line of a step that read `ids`: the whole batch, in the order of virtual workers."""
    share = order.batch_size // order.virtual_workers
    sums = np.zeros(NUM_ENTRIES, dtype=np.float32)
    for worker in range(order.virtual_workers):
        sums += entries(worker, ids[worker * share : (worker + 1) * share])
    return seal(sums)
