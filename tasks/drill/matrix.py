"""One fault after another, each in a run of its own, beside a run that nothing happened to."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from infra.local.files import locked
from infra.settings import Settings
from tasks.drill import measure, scene
from tasks.drill.faults import FAULTS, NAMES, Fault, StoreAway
from tasks.drill.gate import Gate
from tasks.drill.judge import PATIENCE_SECONDS, Struck, Undisturbed, always_promised, row_of
from tasks.drill.rows import Calm, Report, Row
from tasks.drill.scene import Scene
from tasks.drill.subject import code_digest, subject_of
from tasks.drill.watch import Watch
from tasks.provenance import commit_of
from training.config import Preset
from training.data.audit import verify_run
from training.errors import InfrastructureError, UserError
from training.recipe import load_recipe
from training.runs.events import committed
from training.s3.objectstore import Store

TRIAL_SECONDS, MAX_TRIAL_SECONDS = 12.0, 60.0
"""Of steps, in each run."""
NUM_STARTS = 2.0
"""A run lasts so many times as long as its start, so that a node that is lost can be back before its end."""
MIN_STEPS, MAX_STEPS = 20, 10_000
NUM_CHECKPOINTS = 10
SILENCE_SECONDS, HANG_SECONDS = 3.0, 3.0
"""At most: the preset's own values may be less."""
JOIN_SECONDS = 60.0
"""At least: all runs begin on all nodes."""
CALIBRATION_STEPS = 1_000_000
"""It is ended long before."""
CALIBRATION_SECONDS, MIN_CALIBRATION_STEPS = 2.0, 10
NUM_TRIES = 3
"""Of a fault whose run was over before anybody saw that it may be struck."""
STALL_SECONDS = 240.0
"""Without a step, after which a run that nothing happened to is given up."""
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for."""

    preset: Preset
    faults: Sequence[str] = NAMES
    maybe_steps: int | None = None


def plan(preset: Preset, *, faults: Sequence[str] = (), steps: int | None = None) -> Plan:
    """Raises `UserError` for a fault that there is not, or a preset that promises no bits."""
    for name in faults:
        if name not in NAMES:
            raise UserError(f"--faults: there is no fault {name!r} (known: {', '.join(NAMES)})")
    if steps is not None and steps < MIN_STEPS:
        raise UserError(f"--steps {steps}: a drill needs {MIN_STEPS} at least")
    if setting := preset.train.maybe_inexact:
        exact = "train.staleness=0" if preset.train.staleness else "'train.mode=\"exact\"'"
        raise UserError(f"{setting} promises no bits that a fault could change: drill it with --set {exact}")
    if field := preset.parallel.maybe_spread:
        bits = "of another run" if preset.parallel.determining() else "which gives the same bits"
        raise UserError(
            f"parallel.{field} = {getattr(preset.parallel, field)}: a lost rank takes the steps since the newest"
            " checkpoint or copy with it, and a drill demands that no step is done again: drill it with --set"
            f" parallel.{field}=1, {bits}"
        )
    if preset.train.virtual_workers < 2 * preset.launch.processes_per_node:
        raise UserError(
            f"train.virtual_workers = {preset.train.virtual_workers}: a drill trains on two nodes at least, and these"
            f" have {2 * preset.launch.processes_per_node} ranks"
        )
    return Plan(preset=preset, faults=tuple(dict.fromkeys(faults)) or NAMES, maybe_steps=steps)


def run(
    settings: Settings,
    store: Store,
    asked: Plan,
    *,
    dataset_digest: str,
    tell: Tell = lambda line: None,
    done: Callable[[Row], None] = lambda row: None,
    environment: Mapping[str, str] | None = None,
) -> Report:
    """The drill. `tell` hears how far it is, `done` each fault's row; `environment` goes to the agents too.

    One at a time for a stack. Leaves nothing on the store and no process. Raises `InfrastructureError` if the run
    without a fault does not end well: then there is nothing to compare with.
    """
    if StoreAway.name in asked.faults:
        _gate_before(store)
    with locked(settings.home / "drill.lock"):
        scene.clear(settings)
        try:
            return _Drill(settings, store, asked, dataset_digest, tell, environment or {}).run(done)
        finally:
            scene.clear(settings)


class _Drill:
    def __init__(
        self,
        settings: Settings,
        store: Store,
        asked: Plan,
        dataset_digest: str,
        tell: Tell,
        environment: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._store = store
        self._asked = asked
        self._whole_digest = dataset_digest
        self._tell = tell
        self._environment = environment
        self._id = time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6]

    def run(self, done: Callable[[Row], None]) -> Report:
        begun, begun_at = time.monotonic(), time.time()
        stage = self._stage()
        self._tell(f"undisturbed: {stage.preset.train.steps} steps")
        calm = self._undisturbed(stage)
        rows = []
        for number, name in enumerate(self._asked.faults, start=1):
            label = f"{number}/{len(self._asked.faults)} {name}"
            row = self._suffer(stage, name, calm, label)
            rows.append(row)
            done(row)
        train, launch = stage.preset.train, stage.preset.launch
        return Report(
            id=self._id,
            begun_at=begun_at,
            seconds=time.monotonic() - begun,
            preset=self._asked.preset.name,
            subject=subject_of(self._asked.preset, stage.recipe),
            code=code_digest(),
            commit=commit_of(self._asked.preset),
            environment=calm.record.environment,
            num_nodes=launch.nodes,
            processes_per_node=launch.processes_per_node,
            num_cores=len(os.sched_getaffinity(0)),
            num_steps=train.steps,
            batch_size=train.batch_size,
            checkpoint_every_steps=train.checkpoint_every_steps,
            step_seconds=calm.step_seconds,
            silence_seconds=launch.silence_seconds,
            hang_seconds=launch.hang_seconds,
            preset_hang_seconds=self._asked.preset.launch.hang_seconds,
            calm=calm.calm,
            rows=tuple(rows),
        )

    def _stage(self) -> Scene:
        """With a part of the data, and as many steps as take the time that a run should have."""
        scene.note(self._settings, self._id)
        corner = scene.corner_of(self._settings, self._id)
        preset = drilled(self._asked.preset, seed=uuid.uuid4().int >> 66, steps=CALIBRATION_STEPS)
        stage = Scene(
            settings=self._settings,
            store=corner,
            preset=preset,
            recipe=load_recipe(preset),
            dataset_digest=scene.copy_part(self._store, corner, preset.data.name, self._whole_digest),
            environment=self._environment,
        )
        steps = self._asked.maybe_steps or self._calibrated_steps(stage)
        stage = replace(stage, preset=drilled(self._asked.preset, seed=preset.seed, steps=steps))
        scene.note(self._settings, self._id, stage.key)
        return stage

    def _calibrated_steps(self, stage: Scene) -> int:
        self._tell("how long a step takes")
        scene.note(self._settings, self._id, stage.key)
        watch = Watch(stage.begin())
        try:
            while not _is_steady(watch):
                _require_going(stage, watch)
        finally:
            stage.end()
        begun = measure.steps_of(watch.events)[0].time
        return steps_for(measure.median_step_seconds(watch.events), start_seconds=begun - watch.begun_at)

    def _undisturbed(self, stage: Scene) -> Undisturbed:
        watch = Watch(stage.begin())
        try:
            while not watch.is_over:
                _require_going(stage, watch)
        finally:
            stage.end()
        record = watch.record
        assert record.result is not None
        proof = verify_run(stage.store, stage.key)
        return Undisturbed(
            record=record,
            points=measure.history(committed(watch.events, record.resume_steps)),
            step_seconds=measure.median_step_seconds(watch.events),
            start_seconds=measure.steps_of(watch.events)[0].time - watch.begun_at,
            calm=Calm(
                state_sha256=record.result.state_sha256,
                weights_sha256=record.result.weights_sha256,
                num_samples_read=proof.num_samples_read,
                num_whole_epochs=proof.num_whole_epochs,
                run_seconds=time.time() - watch.begun_at,
                complaints=tuple(always_promised(watch, num_nodes=stage.preset.launch.nodes)),
            ),
        )

    def _suffer(self, stage: Scene, name: str, calm: Undisturbed, label: str) -> Row:
        for _ in range(NUM_TRIES):
            struck, row = self._struck_run(stage, name, calm, label)
            if struck.maybe_at is not None or not row.bits_equal:
                break
        return row

    def _struck_run(self, stage: Scene, name: str, calm: Undisturbed, label: str) -> tuple[Struck, Row]:
        """The fault, in a run of its own, until that ends or is given up."""
        with _fault(stage, name) as (fault, endpoint):
            watch = Watch(stage.begin(endpoint=endpoint))
            struck = Struck(fault, start_seconds=calm.start_seconds)
            limit = 5 * calm.calm.run_seconds + 2 * PATIENCE_SECONDS
            try:
                while not watch.is_over and time.time() < watch.begun_at + limit:
                    watch.look()
                    struck.look(stage, watch)
                    self._tell(f"{label}: step {watch.step}/{stage.preset.train.steps}{struck.told}")
                    if struck.is_given_up(stage, watch):
                        break
            finally:
                fault.heal()
                stage.end()
            return struck, row_of(stage, watch, struck, calm)


def drilled(preset: Preset, *, seed: int, steps: int) -> Preset:
    """The preset as a drill trains it: two nodes at least, any of which may go, and as many checkpoints as it takes."""
    launch = replace(
        preset.launch,
        nodes=max(2, preset.launch.nodes),
        min_nodes=1,
        join_seconds=max(preset.launch.join_seconds, JOIN_SECONDS),
        silence_seconds=min(preset.launch.silence_seconds, SILENCE_SECONDS),
        hang_seconds=min(preset.launch.hang_seconds, HANG_SECONDS),
    )
    every = max(1, min(steps, MAX_STEPS) // NUM_CHECKPOINTS)
    train = replace(
        preset.train,
        steps=steps,
        checkpoint_every_steps=every,
        keep_checkpoints=3,
        keep_every_steps=None,
        validate_every_steps=None,
        warm_start=None,
    )
    return replace(preset, seed=seed, train=train, launch=launch)


def steps_for(step_seconds: float, *, start_seconds: float) -> int:
    """As many as take the time that a run should have."""
    seconds = min(MAX_TRIAL_SECONDS, max(TRIAL_SECONDS, NUM_STARTS * start_seconds))
    return max(MIN_STEPS, min(MAX_STEPS, round(seconds / max(step_seconds, 1e-6))))


def _is_steady(watch: Watch) -> bool:
    steps = measure.steps_of(watch.events)
    return len(steps) >= MIN_CALIBRATION_STEPS and steps[-1].time - steps[0].time >= CALIBRATION_SECONDS


def _require_going(stage: Scene, watch: Watch) -> None:
    """Look. Raises `InfrastructureError` if the run fails, or makes no step for long."""
    watch.look()
    if watch.record.failure is not None:
        raise InfrastructureError(f"the run without a fault failed: {watch.record.failure.message}")
    newest = max((event.time for event in watch.events), default=watch.begun_at)
    if time.time() > newest + STALL_SECONDS:
        logs = ", ".join(str(path) for path in stage.launcher.logs(stage.key))
        raise InfrastructureError(f"the run without a fault made no step for {STALL_SECONDS:.0f} s: see {logs}")


@contextmanager
def _fault(stage: Scene, name: str) -> Iterator[tuple[Fault, str | None]]:
    """It, and where the store is for a run that it strikes, if that is another place."""
    if name == StoreAway.name:
        with _gate_before(stage.store) as gate:
            yield StoreAway(gate), f"http://127.0.0.1:{gate.port}"
    else:
        yield FAULTS[NAMES.index(name)](), None


def _gate_before(store: Store) -> Gate:
    """Raises `UserError` for a store that no gate fits."""
    where = urlsplit(store.location.endpoint or "")
    if where.scheme != "http" or where.hostname is None:
        raise UserError("s3-away: only a store at an http:// endpoint can be taken away: leave it out with --faults")
    return Gate(where.hostname, where.port or 80)
