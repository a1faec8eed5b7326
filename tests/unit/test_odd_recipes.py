"""What recipes do in the wild: it is exact through a restart, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.attempts import step_through
from tests.unit.odd_recipes import Odd
from tests.unit.tiny import exact_arithmetic, make_trainer, tiny_preset
from training.checkpoints.snapshot import Snapshot
from training.errors import DeterministicError, UnbrokenError, UserError

WITH_VALIDATION = tiny_preset(validate_every_steps=2, virtual_workers=5)


def digest(*, dies_after: int | None = None, **kinds: str) -> str:
    """Of the state after six steps, in one go or two."""
    trainer = make_trainer(recipe=Odd(**kinds), preset=WITH_VALIDATION)
    if dies_after is not None:
        died = step_through(trainer, dies_after).state.tensors()
        Snapshot().take(died)  # so a checkpoint can hold it
        trainer = make_trainer(recipe=Odd(**kinds), preset=WITH_VALIDATION)
        trainer.state.load({name: tensor.clone() for name, tensor in died.items()}, step=dies_after)
    return step_through(trainer, 6).state.state_sha256()


SUPPORTED: list[dict[str, str]] = [
    {"model_kind": "replaces a buffer"},
    {"model_kind": "changes a passing buffer"},
    {"model_kind": "changes buffers when judged"},
    {"model_kind": "frozen norm"},
    {"optimizer_kind": "head only"},
    {"optimizer_kind": "adafactor"},
    {"optimizer_kind": "counting"},
    {"optimizer_kind": "momentum in one group"},
    {"optimizer_kind": "tensor rate"},
]


@pytest.mark.parametrize("kinds", SUPPORTED, ids=lambda kinds: next(iter(kinds.values())))
def test_a_restart_changes_nothing(kinds: dict[str, str]) -> None:
    assert digest(dies_after=3, **kinds) == digest(**kinds)


@pytest.mark.parametrize("virtual_workers", [4, 5])
def test_what_nobody_changes_keeps_its_bits(virtual_workers: int) -> None:
    """The mean of V equal numbers may be another one, if V is no power of two; or infinite."""
    trainer = make_trainer(recipe=Odd(), preset=tiny_preset(virtual_workers=virtual_workers))
    names = ("mask", "blocked", "pi", "third")
    before = {name: trainer.state.model.get_buffer(name).clone() for name in names}
    step_through(trainer, 3)
    assert all(torch.equal(trainer.state.model.get_buffer(name), before[name]) for name in names)


def test_validation_leaves_modes_and_buffers_alone() -> None:
    for kinds in ({"model_kind": "frozen norm"}, {"model_kind": "changes buffers when judged"}):
        calm = make_trainer(recipe=Odd(**kinds), preset=tiny_preset(virtual_workers=5))
        assert digest(**kinds) == step_through(calm, 6).state.state_sha256()


@pytest.mark.parametrize(
    ("kinds", "kind_of_error", "said"),
    [
        ({"model_kind": "makes a buffer"}, DeterministicError, "got a buffer while it was used, late"),
        ({"model_kind": "grows a buffer"}, DeterministicError, r"made torch.float32 \[10\] of its buffer mean"),
        ({"model_kind": "unfreezes"}, DeterministicError, "norm.weight was frozen or unfrozen during training"),
        ({"model_kind": "complex buffer"}, UserError, "complex buffer, waves"),
        ({"model_kind": "reentrant"}, UserError, "use_reentrant=False"),
        ({"model_kind": "sparse"}, UserError, "sparse gradient"),
        ({"model_kind": "no such kind"}, DeterministicError, r"model\(\): the recipe failed: KeyError"),
        ({"optimizer_kind": "none"}, DeterministicError, r"optimizer\(\): the recipe failed: AttributeError"),
        ({"optimizer_kind": "needs a closure"}, DeterministicError, r"step 1, optimizer.step\(\): the recipe failed"),
        ({"optimizer_kind": "listing"}, UserError, "keeps 'history' of norm.bias as a list|as a list"),
        ({"loss_kind": "detached"}, DeterministicError, r"loss\(\) gave a tensor of shape \[\] that depends on no par"),
        ({"loss_kind": "vector"}, DeterministicError, r"loss\(\) gave a tensor of shape \[2\]"),
        ({"loss_kind": "number"}, DeterministicError, r"loss\(\) gave float"),
        ({"loss_kind": "none"}, DeterministicError, r"loss\(\) gave NoneType"),
        ({"scale_kind": "nan"}, DeterministicError, r"learning_rate_scale\(0, 6\) is nan"),
        ({"scale_kind": "negative"}, DeterministicError, r"learning_rate_scale\(0, 6\) is -1.0"),
        ({"scale_kind": "none"}, DeterministicError, r"learning_rate_scale\(0, 6\) failed: TypeError"),
        ({"scores_kind": "fails"}, DeterministicError, r"scores\(\) on held-out samples: the recipe failed: KeyError"),
    ],
)
def test_what_cannot_be_trained_exactly_is_refused_by_name(
    kinds: dict[str, Any], kind_of_error: type[UnbrokenError], said: str
) -> None:
    with pytest.raises(kind_of_error, match=said):
        digest(**kinds)


def test_a_score_that_is_not_finite_is_told_and_stops_nothing() -> None:
    trainer = make_trainer(recipe=Odd(scores_kind="nan"), preset=WITH_VALIDATION)
    with exact_arithmetic():
        outcomes = [trainer.train_step() for _ in range(2)]
    assert str(outcomes[1].validation["loss"]) == "nan"
