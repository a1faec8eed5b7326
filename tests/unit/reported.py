"""A run as it is left on the store: three groups, a rank that was killed, a node that was lost, and odd names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tasks.done import keep_result
from tasks.results import Bin, Calibration, Estimate, Evaluation, Slice
from tests.unit.tiny import Tiny, tiny_preset
from training.config import Preset
from training.data.manifest import Manifest, manifest_key
from training.runs.events import Event, chunk_key
from training.runs.identity import keep_identity
from training.runs.job import Job, store_job
from training.runs.record import CheckpointRef, Departure, Record, Result, RunRecord, run_key
from training.runs.system import Sample, SampleWriter
from training.s3.objectstore import Store

HOSTILE = '<script>alert("x")</script>'
FORMULA = "$\\frac{1}{2}$ & <b>"
STEPS = 20
BEGUN = 1_700_000_000.0
LOST = (
    Departure(token=1, node=1, cause=f"worker killed by signal 9 {HOSTILE}", step=8, class_name="Killed"),
    Departure(token=2, node=0, cause="node 0 is gone", step=0, class_name="NodeLost"),
)
WEIGHTS = "a" * 64


def disturbed_run(store: Store, *, seed: int = 7, rates: Sequence[float] = (0.1,)) -> RunRecord:
    """Of 20 steps: killed after 8, from memory to 14, lost, and from the checkpoint of 10 to the end."""
    preset = replace(_preset(), seed=seed, hyperparameters={"learning_rate": rates[0]})
    manifest = Manifest(fields={}, splits={"train": (), "test": ()})
    store.put(manifest_key(preset.data.name, manifest.digest), manifest.to_bytes())
    recipe = Tiny(learning_rate=rates[0])
    key = run_key(recipe=recipe, preset=preset, dataset_digest=manifest.digest)
    keep_identity(store, key, recipe=recipe, preset=preset, dataset_digest=manifest.digest)
    run = RunRecord(store, key)
    run.create_if_missing()
    job = Job(key=key, generation=0, preset=preset, dataset_digest=manifest.digest, location=store.location)
    store_job(store, job)
    record = run.update(_recorded)
    for token, events in enumerate(_groups(rates[0]), start=1):
        _tell(run, record, token, events)
    _sample(run, record)
    keep_result(store, f"runs/{key}/results/{'0' * 64}.json", evaluation(key))
    return run


def _preset() -> Preset:
    preset = tiny_preset(steps=STEPS)
    return replace(preset, launch=replace(preset.launch, nodes=2))


def _recorded(record: Record) -> Record:
    checkpoint = CheckpointRef(step=STEPS, token=3, sha256="c" * 64)
    return replace(
        record,
        token=3,
        resume_steps=(0, 5, 10),
        departures=LOST,
        checkpoints=(checkpoint,),
        environment={"torch": f"2 {HOSTILE}"},
        tracking_run_id="f" * 32,
        result=Result(step=STEPS, weights_sha256=WEIGHTS, state_sha256="b" * 64, checkpoint=checkpoint),
    )


def _groups(rate: float) -> Sequence[Sequence[Event]]:
    first = [_began(1, 0, at=0.0, ranks=2, source="start")]
    first += [_step(number, 1, at=1.0 + number, rate=rate) for number in range(1, 9)]
    first.insert(7, _saved(1, 5, at=6.5))
    second = [replace(event, token=2) for event in first if event.kind == "step" and event.step > 5]
    second += [_began(2, 8, at=10.0, ranks=1, source="memory")]
    second += [_step(number, 2, at=2.0 + number + 0.5, rate=rate) for number in range(9, 15)]
    second.insert(6, _saved(2, 10, at=12.8))
    third = [_began(3, 10, at=20.0, ranks=2, source="checkpoint")]
    third += [_step(number, 3, at=10.0 + number, rate=rate) for number in range(11, STEPS + 1)]
    third += [_saved(3, STEPS, at=31.0), Event(kind="finished", time=BEGUN + 31.5, token=3, step=STEPS)]
    return first, second, third


def _began(token: int, step: int, *, at: float, ranks: int, source: str) -> Event:
    values = {"world_size": ranks, "resumed_from": step, "source": source}
    return Event(kind="attempt", time=BEGUN + at, token=token, step=step, values=values)


def _step(number: int, token: int, *, at: float, rate: float) -> Event:
    values: dict[str, Any] = {
        "loss": 2.0 / number,
        "grad_norm": 1.0 / number,
        "learning_rate": rate,
        "samples_per_second": 20.0,
        "seconds": 0.9,
        "validation": {"loss": 0.5, FORMULA: 0.25} if number % 5 == 0 else {},
    }
    return Event(kind="step", time=BEGUN + at, token=token, step=number, values=values)


def _saved(token: int, step: int, *, at: float) -> Event:
    return Event(kind="checkpoint", time=BEGUN + at, token=token, step=step, values={"sha256": "c" * 64})


def _tell(run: RunRecord, record: Record, token: int, events: Sequence[Event]) -> None:
    """In two chunks."""
    half = len(events) // 2
    for number, part in enumerate((events[:half], events[half:])):
        run.store.put(chunk_key(run.prefix(record), token, number), b"".join(event.to_line() for event in part))


def _sample(run: RunRecord, record: Record) -> None:
    for node in (0, 1):
        writer = SampleWriter(run.store, run.prefix(record), node=node, incarnation="i")
        for second in (1.0, 11.0, 21.0):
            writer.send(
                Sample(
                    time=BEGUN + second,
                    cpu_utilization_percentage=50.0,
                    system_memory_usage_megabytes=1000.0,
                    system_memory_usage_percentage=25.0,
                    network_receive_megabytes=second,
                    network_transmit_megabytes=second,
                )
            )


def evaluation(key: str) -> Evaluation:
    estimate = Estimate(value=0.75, low=0.5, high=1.0)
    return Evaluation(
        run_key=key,
        num_samples=4,
        confidence=0.95,
        metrics={FORMULA: estimate, "accuracy": estimate},
        confusion=((2, 1), (0, 1)),
        slices=(Slice(name=HOSTILE, num_samples=3, metrics={FORMULA: estimate}),),
        calibration=Calibration(error=0.1, bins=(Bin(num_samples=4, confidence=0.7, accuracy=0.75),)),
        scores_sha256="d" * 64,
    )
