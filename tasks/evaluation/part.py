"""`python -m tasks.evaluation.part PART.json`: score the batches of one of several processes.

The scores go beside that file; or what is wrong, so that whoever started it can raise the same error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tasks.evaluation.samples import to_parquet
from tasks.evaluation.scoring import SCORES, Part, score_part
from tasks.parts import errors_told
from training.documents import parse
from training.processes import die_with
from training.s3.objectstore import Store


def main() -> None:
    path = Path(sys.argv[1])
    part = parse(Part, json.loads(path.read_text()))
    die_with(part.parent_pid)
    store = Store(part.location)
    with errors_told(path):
        samples = score_part(
            store, part.preset, part.dataset_digest, part.run_key, rank=part.rank, world_size=part.world_size
        )
    path.with_suffix(SCORES).write_bytes(to_parquet(samples))


if __name__ == "__main__":
    main()
