"""The training state is everything: each entry that is not restored shows in what the resumed run computes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tests.unit.tiny import CPU, Tiny, exact_arithmetic, make_trainer
from training import tensorfile
from training.checkpoints.snapshot import Image
from training.checkpoints.state import TrainState, tensors_sha256
from training.documents import canonical_json
from training.errors import DamagedError, DeterministicError
from training.loop import Trainer
from training.tensorfile import Layout, Place

ENTRIES = (
    "model.norm.bias",
    "model.norm.num_batches_tracked",
    "model.norm.running_mean",
    "model.norm.running_var",
    "model.norm.weight",
    "model.weight",
    "optimizer.exp_avg.norm.bias",
    "optimizer.exp_avg.norm.weight",
    "optimizer.exp_avg.weight",
    "optimizer.exp_avg_sq.norm.bias",
    "optimizer.exp_avg_sq.norm.weight",
    "optimizer.exp_avg_sq.weight",
    "optimizer.step.norm.bias",
    "optimizer.step.norm.weight",
    "optimizer.step.weight",
)
OPTIMIZER_ENTRIES = tuple(name for name in ENTRIES if name.startswith("optimizer."))


def trained(num_steps: int) -> Trainer:
    trainer = make_trainer()
    with exact_arithmetic():
        for _ in range(num_steps):
            trainer.train_step()
    return trainer


def copied(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def resumed(tensors: Mapping[str, Tensor], *, step: int, until: int) -> str:
    trainer = make_trainer()
    trainer.state.load(tensors, step=step)
    with exact_arithmetic():
        while trainer.state.step < until:
            trainer.train_step()
    return trainer.state.state_sha256()


def test_the_entries_are_all_that_a_step_changes() -> None:
    before, state = copied(trained(0).state), trained(2).state
    assert tuple(state.tensors()) == ENTRIES
    assert all(name not in before or not torch.equal(before[name], state.tensors()[name]) for name in ENTRIES)


def test_loading_gives_the_same_digests() -> None:
    state = trained(2).state
    other = make_trainer().state
    assert other.state_sha256() != state.state_sha256()
    other.load(copied(state), step=2)
    assert other.state_sha256() == state.state_sha256()
    assert other.weights_sha256() == state.weights_sha256()
    assert other.step == 2


def test_a_resumed_run_computes_the_bits_of_an_uninterrupted_one() -> None:
    assert resumed(copied(trained(2).state), step=2, until=5) == trained(5).state.state_sha256()


@pytest.mark.parametrize("missing", ENTRIES)
def test_without_any_one_entry_a_resumed_run_differs_or_is_refused(missing: str) -> None:
    """An entry of the model stays as it was made anew; one of the optimizer is not there at all."""
    tensors = copied(trained(2).state)
    if missing in OPTIMIZER_ENTRIES:
        del tensors[missing]
    else:
        tensors[missing] = make_trainer().state.tensors()[missing].clone()
    try:
        digest = resumed(tensors, step=2, until=5)
    except DeterministicError:  # of the optimizer, that finds an entry missing
        return
    assert digest != trained(5).state.state_sha256()


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    image = Image(tensors)
    file = bytearray(image.num_bytes)
    image.write(memoryview(file))
    return tensorfile.layout(tensorfile.head(lambda start, stop: memoryview(file)[start:stop]))


def test_a_state_that_was_put_into_its_places_is_not_copied() -> None:
    """Weights lie where they did, what the optimizer keeps where it was put; and all goes on with the same bits."""
    tensors, trainer = copied(trained(2).state), make_trainer()
    before = {name: tensor.data_ptr() for name, tensor in trainer.state.tensors().items()}
    places = trainer.state.places(layout_of(tensors))
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
    trainer.state.load(places, step=2, may_keep=True)
    assert {name: trainer.state.tensors()[name].data_ptr() for name in places} == {
        name: before.get(name, place.data_ptr()) for name, place in places.items()
    }
    with exact_arithmetic():
        trainer.train_step()
    assert trainer.state.state_sha256() == trained(3).state.state_sha256()


@pytest.mark.parametrize("place", [torch.zeros(4, 3).t(), torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4, 3)])
def test_what_does_not_lie_as_in_the_file_is_no_place_for_it(place: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_trainer().state
    monkeypatch.setattr(state, "tensors", lambda: {"model.weight": place})
    layout = {"model.weight": Place(dtype=torch.float32, shape=(3, 4), start=0, stop=48)}
    found = state.places(layout)["model.weight"]
    assert (found.dtype, tuple(found.shape), found.is_contiguous()) == (torch.float32, (3, 4), True)
    assert found.data_ptr() != place.data_ptr()


def test_who_made_room_puts_what_the_optimizer_keeps_there_and_goes_on_with_the_same_bits() -> None:
    tensors, trainer = copied(trained(2).state), make_trainer()
    untouched = trainer.state.state_sha256()
    trainer.state.make_room(trainer.recipe)
    assert trainer.state.state_sha256() == untouched
    room = {name: tensor.data_ptr() for name, tensor in trainer.state._room.items()}
    assert set(room) == set(OPTIMIZER_ENTRIES)
    places = trainer.state.places(layout_of(tensors))
    assert {name: places[name].data_ptr() for name in room} == room
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
    trainer.state.load(places, step=2, may_keep=True)
    with exact_arithmetic():
        while trainer.state.step < 5:
            trainer.train_step()
    assert trainer.state.state_sha256() == trained(5).state.state_sha256()


def test_an_optimizer_that_cannot_make_a_step_just_so_makes_no_room() -> None:
    class Asking(Tiny):
        def optimizer(self, model: nn.Module) -> Optimizer:
            return LBFGS(model.parameters())

    state = TrainState(Asking(), seed=1, device=CPU)
    state.make_room(Asking())
    assert state._room == {}


def test_without_the_position_a_resumed_run_differs() -> None:
    assert resumed(copied(trained(2).state), step=1, until=4) != trained(5).state.state_sha256()


def test_a_state_owns_its_tensors() -> None:
    """What was loaded from is not changed by the steps that follow."""
    state = trained(2).state
    before = state.state_sha256()
    other = make_trainer()
    other.state.load(state.tensors(), step=2)
    with exact_arithmetic():
        other.train_step()
    assert state.state_sha256() == before


def is_accepted(tensors: Mapping[str, Tensor]) -> bool:
    try:
        make_trainer().state.load(tensors, step=2)
    except DamagedError:
        return False
    return True


def test_a_missing_weight_and_one_of_another_shape_are_refused() -> None:
    """What the optimizer keeps is its own affair: that nothing is missing there, the checkpoint's digests prove."""
    tensors = copied(trained(2).state)
    for entry in set(ENTRIES) - set(OPTIMIZER_ENTRIES):
        assert not is_accepted({name: tensors[name] for name in ENTRIES if name != entry})
        assert not is_accepted({**tensors, entry: torch.zeros(7)})


@pytest.mark.parametrize("entry", ["model.other", "optimizer.exp_avg.other"])
def test_an_entry_that_this_model_lacks_is_refused(entry: str) -> None:
    assert not is_accepted({**copied(trained(2).state), entry: torch.zeros(1)})


def test_a_state_before_the_first_step_can_be_loaded() -> None:
    tensors = copied(make_trainer().state)
    assert not [name for name in tensors if name.startswith("optimizer.")]
    assert resumed(tensors, step=0, until=2) == trained(2).state.state_sha256()


def test_the_seed_alone_decides_the_initial_weights() -> None:
    first, again, other = (TrainState(Tiny(), seed=seed, device=CPU).weights_sha256() for seed in (1, 1, 2))
    assert first == again != other


def test_the_learning_rate_is_always_a_scale_of_the_peak() -> None:
    state = make_trainer().state
    for scale in (0.5, 0.1, 1.0):
        state.set_learning_rate_scale(scale)
        assert state.optimizer.param_groups[0]["lr"] == Tiny().learning_rate * scale


def test_the_digest_covers_names_dtypes_shapes_and_bytes() -> None:
    base = {"a": torch.zeros(2, 2), "b": torch.ones(1)}
    digests = {
        tensors_sha256(tensors)
        for tensors in (
            base,
            {"a": base["a"], "c": base["b"]},
            {**base, "a": torch.zeros(4)},
            {**base, "a": torch.zeros(2, 2, dtype=torch.int32)},
            {**base, "a": -torch.zeros(2, 2)},
            {"a": base["a"]},
        )
    }
    assert len(digests) == 6
    assert tensors_sha256(dict(reversed(base.items()))) == tensors_sha256(base)
    assert tensors_sha256({"a": torch.arange(6).view(2, 3).t().contiguous().t()}) == tensors_sha256(
        {"a": torch.arange(6).view(2, 3)}
    )


@pytest.mark.parametrize(
    "shape", [[0, 2**63 - 1, 4], [2**62, 2**62, 0], [0, 10**19], [-1], [True], [True, 0], ["2"], [1.0]]
)
def test_a_shape_that_torch_cannot_count_is_damage(shape: list[object]) -> None:
    head = canonical_json({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    file = bytearray(len(head).to_bytes(8, "little") + head)
    with pytest.raises(DamagedError, match="a file of tensors is damaged"):
        tensorfile.tensors(memoryview(file))
