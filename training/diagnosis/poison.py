"""Which record makes a step fail: one virtual worker's microbatch is replayed on parts of its records.

A replay keeps the microbatch's shape: where a record is left out, another one stands twice.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from training.arithmetic.extras import Extras
from training.arithmetic.objective import Objective, is_lack_of_memory, seed_streams, stream_seed
from training.checkpoints.state import TrainState
from training.data import ledger
from training.data.withdrawn import record_of
from training.errors import DeterministicError
from training.recipe import Recipe

MAX_ALONE = 3
"""So many records that each fail by themselves are looked for; if it fails without them too, it is for no record."""
MAX_TOGETHER = 4
"""So many records are looked for that fail only together."""
NUM_CONFIRMATIONS = 3
"""So often what was found must fail once more before it is named."""

Batch = Mapping[str, Tensor]
Samples = tuple[Sequence[str], Batch]
"""Ids, and what they stand for."""
Fails = Callable[[Sequence[str]], bool]
"""Whether a replay on some records fails as the step did; on none of them, other samples are taken."""
NO_ENTRIES = np.zeros(ledger.NUM_ENTRIES, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What replays have shown."""

    alone: tuple[str, ...] = ()
    """Each of these records makes it fail by itself."""
    together: tuple[str, ...] = ()
    """These do, but not without any of them; or, of many, the fewest that were found."""
    fails_without: bool = False
    """It fails without those `alone`, too."""
    repeats: bool = True
    """Replays on the same records did the same each time; if not, nobody is to blame."""
    num_replays: int

    @property
    def poison(self) -> tuple[str, ...]:
        """Records that are to blame, each by itself."""
        return self.alone if self.repeats and not self.fails_without else ()

    def __str__(self) -> str:
        if not self.repeats:
            return "the failure does not repeat: a replay on the same records fails now and then, so none is named"
        told = []
        if self.alone:
            each = "record {} makes" if len(self.alone) == 1 else "each of the records {} makes"
            told.append(f"{each.format(', '.join(self.alone))} it fail by itself")
        if self.together:
            told.append(f"{', '.join(self.together)} make it fail together, and none of them alone")
        elif self.fails_without:
            told.append("other samples do so, too: no record is to blame")
        else:
            told.append("without, it does not fail")
        return f"{'; '.join(told)} ({self.num_replays} replays)"


def max_replays(num_records: int) -> int:
    """How many replays a search takes at most that finds one record."""
    return math.ceil(math.log2(max(1, num_records))) + 3 + NUM_CONFIRMATIONS


class Search:
    """For the fewest records that fail, by bisection. As a rule that is one."""

    def __init__(self, fails: Fails) -> None:
        """`fails` may raise `TimeoutError`."""
        self._fails = fails
        self._known: dict[frozenset[str], bool] = {}
        self._num_replays = 0

    @property
    def has_failed(self) -> bool:
        """Whether a replay did."""
        return any(self._known.values())

    def fails(self, records: Sequence[str]) -> bool:
        key = frozenset(records)
        if key not in self._known:
            self._known[key] = self._fails_anew(records)
        return self._known[key]

    def _fails_anew(self, records: Sequence[str]) -> bool:
        self._num_replays += 1
        return self._fails(records)

    def run(self, records: Sequence[str]) -> Finding | None:
        """None if they do not fail again at all."""
        found = self._find(records)
        if found is None:
            return None
        return replace(found, repeats=self._is_confirmed(found), num_replays=self._num_replays)

    def _is_confirmed(self, found: Finding) -> bool:
        """A record that makes it fail now and then misleads a bisection, to records that are not to blame."""
        together = found.together
        fail = [[record] for record in found.alone] + ([together] if together else [])
        fewer = [[record for record in together if record != left_out] for left_out in together[:MAX_TOGETHER]]
        expected = [(records, True) for records in fail] + [(records, False) for records in fewer]
        return all(self._fails_anew(records) is fails for records, fails in expected * NUM_CONFIRMATIONS)

    def _find(self, records: Sequence[str]) -> Finding | None:
        rest = list(dict.fromkeys(records))
        if not self.fails(rest):
            return None
        alone: list[str] = []
        while len(alone) < MAX_ALONE and rest and self.fails(rest):
            fewest = self._fewest(rest)
            if len(fewest) > 1:
                return Finding(alone=tuple(alone), together=tuple(fewest), num_replays=self._num_replays)
            alone += fewest
            rest = [record for record in rest if record not in fewest]
        return Finding(alone=tuple(alone), fails_without=self.fails(rest), num_replays=self._num_replays)

    def _fewest(self, records: list[str]) -> list[str]:
        """Of records that fail: those of which none can be left out, one after another by its place. With those that
        are found already, a longer beginning of the rest fails if a shorter one does."""
        needed: list[str] = []
        rest = records
        while len(needed) < MAX_TOGETHER and not (needed and self.fails(needed)):
            low, high = 0, len(rest)
            while high - low > 1:
                middle = (low + high) // 2
                if self.fails([*needed, *rest[:middle]]):
                    high = middle
                else:
                    low = middle
            needed, rest = [*needed, rest[low]], rest[:low]
        return needed if self.fails(needed) else [*needed, *rest]


def keeping(records: Sequence[str], some: Sequence[str]) -> list[int]:
    """For each place of a microbatch with these records, the place whose sample stands there if only some are in it."""
    wanted = set(some)
    kept = [place for place, record in enumerate(records) if record in wanted]
    return [place if record in wanted else kept[place % len(kept)] for place, record in enumerate(records)]


class Replay:
    """Forward and backward of a virtual worker in the step that a state has before it. Nothing of that state changes;
    what hangs on the model's parameters and takes their gradients up hears nothing."""

    def __init__(self, recipe: Recipe, state: TrainState, extras: Extras, *, seed: int, precision: str) -> None:
        """`extras` holds the buffers that the step began with."""
        self._state = state
        self._extras = extras
        self._seed = seed
        self._objective = Objective(recipe, state.model, precision=precision)

    def failure(self, worker: int, batch: Batch) -> str:
        """What goes wrong, and where, in the same words each time; empty if nothing does.

        Lets through what says that memory ran out.
        """
        parameters = [p for p in self._state.model.parameters() if p.requires_grad]
        self._extras.begin_worker()
        seed_streams(stream_seed(self._seed, self._state.step, worker), parameters[0].device)
        try:
            loss = self._objective(batch)
            if not torch.isfinite(loss):
                return "the loss is not finite"
            self._extras.gather(loss.detach(), (), NO_ENTRIES)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        except Exception as error:
            if is_lack_of_memory(error):
                raise
            return _place_of(error)
        values = [each._values() if each.is_sparse else each for each in gradients if each is not None]
        is_finite = all(torch.isfinite(each).all() for each in values)
        return "" if is_finite else "a gradient is not finite"


def _place_of(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno}"


def explained(
    error: DeterministicError,
    failure: Callable[[Batch], str],
    microbatch: Samples,
    others: Callable[[], Samples],
    *,
    seconds: float,
) -> DeterministicError | RuntimeError | None:
    """The error, with the records of its microbatch that cause it; an ordinary one if it comes again now and then, None
    if it does not.

    `failure` is the replay's, `others` gives a microbatch that the step did not read. After so many seconds the search
    is given up.
    """
    deadline = time.monotonic() + seconds
    ids, batch = microbatch
    records = [record_of(sample) for sample in ids]
    maybe_first: str | None = None

    def fails(some: Sequence[str]) -> bool:
        nonlocal maybe_first
        if time.monotonic() > deadline:
            raise TimeoutError
        found = failure(_part(batch, keeping(records, some)) if some else others()[1])
        maybe_first = found if maybe_first is None else maybe_first
        return bool(found) and found == maybe_first

    return told(error, fails, records, seconds=seconds)


def _part(batch: Batch, places: Sequence[int]) -> Batch:
    return {name: field[torch.tensor(places, device=field.device)] for name, field in batch.items()}


def told(
    error: DeterministicError, fails: Fails, records: Sequence[str], *, seconds: float
) -> DeterministicError | RuntimeError | None:
    """The error, with what a search among the records finds: an ordinary one, which is tried again, if it fails now and
    then; None if it fails no more, as far as could be seen."""
    search = Search(fails)
    try:
        finding = search.run(records)
    except TimeoutError:
        if not search.has_failed:
            return None
        return DeterministicError(f"{error}; which record it is was not found within {seconds:.0f} s of replays")
    if finding is None:
        return None
    words = f"{error}; {finding}"
    return DeterministicError(words, records=finding.poison) if finding.repeats else RuntimeError(words)
