"""What a user brings: a recipe. Model, loss, scores, and how a record becomes samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from training.config import Preset
from training.errors import DeterministicError, UserError
from training.preset_file import build
from training.sources import import_recipe

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from torch.optim import Optimizer

Sample = Mapping[str, "np.ndarray[Any, Any]"]
"""One training example: a few arrays by name, with the same dtypes and shapes in every sample."""


@dataclass(frozen=True)
class Table:
    """Many samples at once: arrays by name, each with one row per sample. The same as its rows given one by one."""

    columns: Mapping[str, np.ndarray[Any, Any]]

    def __post_init__(self) -> None:
        import numpy as np

        if not (isinstance(self.columns, Mapping) and self.columns):
            raise ValueError(f"a Table is of arrays by name, not {self.columns!r:.80}")
        for name, column in self.columns.items():
            if not isinstance(column, np.ndarray):
                raise ValueError(f"a Table's column {name!r} is a {type(column).__name__}, not a numpy array")
            if isinstance(column, np.ma.MaskedArray):
                raise ValueError(f"a Table's column {name!r} is masked, and a mask is not kept: fill it, or give both")
            if not column.ndim or column.dtype.hasobject:  # rows may be anything then, and each something else
                raise ValueError(
                    f"a Table's column {name!r} has dtype {column.dtype} and shape {column.shape}: no rows"
                )
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"a Table's columns differ in length: {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __iter__(self) -> Iterator[Sample]:
        return (self.row(number) for number in range(len(self)))

    def row(self, number: int) -> Sample:
        return {name: column[number] for name, column in self.columns.items()}


Decode = Callable[[Sample, "np.random.Generator | None"], Sample]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of the source, as it was found."""

    id: str
    """Where it lies: `folder/file` or `file:line`."""
    data: bytes
    """A file's bytes, or a line's without its end; empty if the format has fields."""
    label: int | None = None
    """With `format = "folders"`: the number of the folder among the classes."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """With `parquet` the row's columns; with `webdataset` the members' bytes by their extension."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Two matrices, with units between them that are computed each by itself: an attention's heads, or the numbers
    within a feed-forward layer. Ranks may have some of the units each."""

    columns: nn.Linear
    """Gives the units: so many numbers of the first one, as many of the next, …"""
    rows: nn.Linear
    """Takes what was made of them, in the same order."""
    num_units: int
    num_repeats: int = 1
    """`columns` gives all units so many times, one time after another (3: queries, keys and values)."""


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Subclass as a frozen keyword-only dataclass: its fields are filled from `[hyperparameters]`."""

    metrics: ClassVar[Mapping[str, str]] = {"loss": "min"}
    """The scores to report, and whether a greater ("max") or a smaller ("min") one is better."""

    slices: ClassVar[tuple[str, ...] | None] = None
    """Scores, of whole numbers, by whose values samples are judged separately as well. None: by `label`, if that is
    scored and whole."""

    ragged: ClassVar[frozenset[str]] = frozenset()
    """Fields that `encode` gives with a first length that differs from sample to sample (text, compressed images)."""

    @abstractmethod
    def encode(self, record: Record) -> Iterable[Sample | Table]:
        """The samples of one record (none, one or many), singly or as tables. A pure function; `ValueError` says what
        is wrong.
        """

    def decode(self, sample: Sample, random: np.random.Generator | None) -> Sample:
        """A stored sample as the model wants it: unpacked, augmented, every array of a fixed shape.

        `random` depends on the seed, the epoch and the sample alone; None when nothing may be left to chance
        (evaluation). Called for every sample of every epoch, by several threads at once; a pure function.
        """
        return sample

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model. Its random initial weights come from torch's global generator, seeded by the caller."""

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Parts of the model that are computed one after another, each from what the one before gave: between them it
        may be cut, and each may be on a device while others are not. None: it is one piece."""
        return ()

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        """All of the model as modules that are computed one after another, each called with what the one before gave (a
        tensor, or a tuple of them), the first with `inputs`; its `blocks` among them. None: it has no pipeline."""
        return ()

    def cuts(self, model: nn.Module) -> Sequence[Cut]:
        """Matrices of the model of which ranks may have a part each. What is computed between two of them must work
        with fewer units. None: it is not cut so."""
        return ()

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss (a scalar) over a batch: the samples' arrays, stacked."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One number per sample (shape [batch]) for each metric; `label` and `predicted` give a confusion matrix, and
        `confidence` (the probability of what is predicted) how well that is calibrated."""

    @abstractmethod
    def inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model itself takes, from a batch: the input of the registered model."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> Optimizer:
        """An elementwise optimizer (SGD, Adam, AdamW, …), its `lr` being the peak."""

    def learning_rate_scale(self, step: int, num_steps: int) -> float:
        """What the peak learning rate is multiplied with at a step (from 0)."""
        return 1.0


def maybe_decode(recipe: Recipe) -> Decode | None:
    """The recipe's own `decode`; None if it has none, so that whole arrays can be copied at once."""
    return recipe.decode if type(recipe).decode is not Recipe.decode else None


def learning_rate_scale(recipe: Recipe, step: int, num_steps: int) -> float:
    """The recipe's own, checked. Raises `DeterministicError` unless it is a finite number, and not negative."""
    where = f"the recipe's learning_rate_scale({step}, {num_steps})"
    try:
        scale = float(recipe.learning_rate_scale(step, num_steps))
    except Exception as error:
        raise DeterministicError(f"{where} failed: {type(error).__name__}: {error}") from error
    if not 0 <= scale < math.inf:
        raise DeterministicError(f"{where} is {scale}: it must be finite, and not negative")
    return scale


def load_recipe(preset: Preset) -> Recipe:
    """Import and build the preset's recipe. Raises `UserError` naming the field, the module or the class."""
    kind = import_recipe(preset.recipe, preset.folder)
    if not (isinstance(kind, type) and issubclass(kind, Recipe)):
        raise UserError(f"recipe = {preset.recipe!r}: {kind!r} is not a subclass of training.recipe.Recipe")
    if not is_dataclass(kind) or getattr(kind, "__abstractmethods__", None):
        missing = ", ".join(sorted(kind.__abstractmethods__)) or "the @dataclass decorator"
        raise UserError(f"recipe = {preset.recipe!r}: {kind.__name__} lacks {missing}")
    return build(kind, preset.hyperparameters, where="hyperparameters")
