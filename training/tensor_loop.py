"""The training loop of one rank that has a part of each matrix: the bits are those of so many parts, with any number of
replicas (docs/parallelism.md)."""

from __future__ import annotations

from datetime import timedelta
from functools import cached_property

from training.arithmetic.balance import ranges
from training.arithmetic.objective import Objective
from training.diagnosis.poison import Samples
from training.errors import DeterministicError
from training.layout import Layout, in_tensors
from training.memory.handover import GroupLost
from training.parallel.tensor import CutModel, TensorGroups, make_tensor_groups
from training.parallel.tensor_peers import Peers
from training.parallel.tensor_trial import TensorTrial
from training.parallel.tensor_update import TensorReducer, TensorUpdate
from training.replica_loop import ReplicaTrainer


class TensorTrainer(ReplicaTrainer):
    """Trains one run to its end, `parallel.tensor` ranks together one replica. `train` is collective."""

    _is_cut_off = False
    """From the other ranks of its replica, for the rest of this step, which is the last."""

    @property
    def layout(self) -> Layout:
        return in_tensors(self.rank.world_size, self.preset.parallel.tensor)

    @cached_property
    def groups(self) -> TensorGroups:
        timeout = timedelta(seconds=self.preset.launch.collective_timeout_seconds)
        with self.together():
            return make_tensor_groups(self.layout, self.rank.rank, timeout=timeout)

    @cached_property
    def cut(self) -> CutModel:
        """The model, once its state was loaded. New weights alone are tried: of trained ones roundings may be large,
        and a run that is taken up has been tried. Collective."""
        assert self.digest_period >= 0  # which hangs on the size of the whole
        groups, model = self.groups, self.state.model
        maybe_trial = TensorTrial(self.recipe, model, self.one_to_try()) if self.state.step == 0 else None
        cut = CutModel(
            self.recipe,
            model,
            Peers(groups.computing, waiting=self.together),
            in_sequences=self.preset.parallel.sequences == "parts",
            maybe_settling=Peers(groups.settling, waiting=self.together),
        )
        if maybe_trial is not None:
            self._require_same(maybe_trial, cut)
        return cut

    def _require_same(self, trial: TensorTrial, cut: CutModel) -> None:
        """A rank that is lost meanwhile is not the recipe's doing."""
        try:
            with self.together():
                trial.require_same(cut)
        except DeterministicError as error:
            if isinstance(error.__cause__, GroupLost):
                raise error.__cause__ from None
            raise

    @cached_property
    def reducer(self) -> TensorReducer:
        return TensorReducer(
            Objective(self.recipe, self.state.model, precision=self.preset.train.precision),
            self.cut,
            groups=self.groups,
            num_extras=self.extras.num_elements,
            ranges=ranges(self.balance.shares),
        )

    def new_update(self) -> TensorUpdate:
        return TensorUpdate(self.state, self.cut, clip_norm=self.preset.train.clip_norm)

    def virtual_worker_step(self, worker: int) -> None:
        if self._is_cut_off:
            self.reducer.give_up(worker, self.told_of_failed())
        else:
            super().virtual_worker_step(worker)

    def fail(self, error: DeterministicError, worker: int, samples: Samples) -> None:
        """Not yet, for the others are to hear of it first: those of the replica, which wait for this rank in the midst
        of the same virtual worker, by their connections, and all by the step's loss."""
        if isinstance(error.__cause__, GroupLost):  # another has cut them, or is gone, or a cable: the end tells which
            self._maybe_broken = str(error.__cause__)
        else:
            self.give_up(worker, error)
        self.groups.connections.cut()
        self._is_cut_off = True
        self.reducer.give_up(worker, self.told_of_failed())
