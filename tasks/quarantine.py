"""Going on without records that make the training fail: they are withdrawn, and what follows is another run."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tasks import tracking
from tasks.results import Dataset, TrainedModel
from tasks.stack import open_stack
from training.config import Preset
from training.data.withdraw import withdraw
from training.data.withdrawn import QUARANTINED
from training.errors import DeterministicError

log = logging.getLogger(__name__)


def trained(
    preset: Preset,
    *,
    shard: Callable[[], Dataset],
    train: Callable[[Dataset], TrainedModel],
    quarantine: bool,
) -> tuple[Dataset, TrainedModel]:
    """Both stages. With `quarantine` they are done again without each record that the training fails by, as long as
    those are no more than `launch.max_quarantined`.

    Raises `DeterministicError` if it fails by none, or by too many; `UserError`, before anything is read, if MLflow
    could not show the run.
    """
    tracking.require_shown(open_stack()[0].mlflow_uri, preset)
    num_quarantined = 0
    while True:
        dataset = shard()
        try:
            return dataset, train(dataset)
        except DeterministicError as error:
            if not error.records:
                raise
            if not quarantine:
                hint = f"{error}. Mend the data, or go on without: --quarantine"
                raise DeterministicError(hint, records=error.records) from error
            num_quarantined += len(error.records)
            _require_few(preset, num_quarantined, error)
            _withdraw(dataset, error)


def _require_few(preset: Preset, number: int, error: DeterministicError) -> None:
    most = preset.launch.max_quarantined
    if number > most:
        raise DeterministicError(
            f"{error}. This would be record {number} in quarantine, and launch.max_quarantined is {most}: look at the"
            " data before you allow more",
            records=error.records,
        ) from error


def _withdraw(dataset: Dataset, error: DeterministicError) -> None:
    records = ", ".join(error.records)
    log.warning("quarantine: goes on without %s, of dataset %s: %s", records, dataset.name, error)
    withdraw(open_stack()[1], dataset.name, dataset.digest, error.records, reason=f"{QUARANTINED}{error}")
