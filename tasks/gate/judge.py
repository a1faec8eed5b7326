"""Judging one registered version against the champion: scores and proofs are brought together, the decision is kept."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from infra.settings import Settings, gate_policy_path
from tasks import registry
from tasks.drill.subject import code_digest, subject_of
from tasks.evaluation.samples import Samples, find_or_score
from tasks.evaluation.scoring import score_samples
from tasks.gate.decide import Decision, Reason, decide
from tasks.gate.policy import Policy, load_policy
from tasks.initial import require_fitting
from training.checkpoints.trust import trusted_result
from training.config import ParallelConfig, Preset
from training.data.audit import verify_run
from training.documents import canonical_json, sha256_hex
from training.errors import DamagedError, UserError
from training.recipe import load_recipe
from training.runs.job import Job
from training.runs.proof import find_job, own_recipe
from training.runs.record import InitialWeights, RunRecord
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

MAX_REASON_CHARACTERS = 1000


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A decision, and all that it is a function of. No time is in it: the same again is the same object."""

    model: str
    version: str
    run_key: str
    dataset_digest: str
    scores_sha256: str
    champion: str | None
    """The version that it was compared with."""
    champion_scores_sha256: str | None
    policy: Policy
    decision: Decision
    format: int = 1

    @property
    def passed(self) -> bool:
        return self.decision.passed

    def to_bytes(self) -> bytes:
        return canonical_json(asdict(self))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it was refused; none if it was not."""
        return tuple(reason.text for reason in self.decision.reasons if not reason.passed)

    @property
    def sha256(self) -> str:
        return sha256_hex(self.to_bytes())

    @property
    def key(self) -> str:
        return f"models/{self.model}/decisions/{self.sha256}.json"


@dataclass(frozen=True, kw_only=True)
class _Version:
    """A registered version and the run that it came from."""

    name: str
    number: str
    run_key: str
    weights_sha256: str
    job: Job


def judge(settings: Settings, store: Store, name: str, version: str, *, champion: str | None) -> Judgement:
    """Decide whether `version` of a model may follow `champion`, the version that is it now (None: the first one).

    Both are judged on the held-out samples of the challenger's dataset version; what is not known of the champion is
    scored now. The judgement is kept on the store, beside the version's run in MLflow and, in short, in its tags.
    Raises `UserError` if the policy, or the run of one of the two, cannot be used; `InfrastructureError` if a server is
    away. A challenger that is refused raises nothing.
    """
    policy = load_policy(gate_policy_path(), name)
    challenger = _find(settings, store, name, version)
    sha256, samples = _scores(store, challenger, challenger.job)
    against: tuple[str, Samples] | tuple[None, None] = (None, None)
    if champion is not None:
        against = _scores(store, _find(settings, store, name, champion), challenger.job)
    judgement = Judgement(
        model=name,
        version=version,
        run_key=challenger.run_key,
        dataset_digest=challenger.job.dataset_digest,
        scores_sha256=sha256,
        champion=champion,
        champion_scores_sha256=against[0],
        policy=policy,
        decision=decide(policy, samples, against[1], _proofs(settings, store, policy, challenger)),
    )
    store.put_immutable(judgement.key, judgement.to_bytes(), sha256=judgement.sha256)
    _tell(settings, judgement)
    return judgement


def _find(settings: Settings, store: Store, name: str, number: str) -> _Version:
    """Raises `UserError` if its run is gone, or was trained anew and holds other weights now."""
    run_key, weights_sha256 = registry.origin_of(settings.mlflow_uri, name, number)
    record, job = RunRecord(store, run_key).find(), find_job(store, run_key)
    if record is None or record.result is None or record.result.weights_sha256 != weights_sha256 or job is None:
        raise UserError(
            f"model {name!r} version {number}: its weights {weights_sha256[:12]} are no more the result of run"
            f" {run_key[:12]} on this store: it cannot be judged"
        )
    own_recipe(store, job, may_have_changed=True)
    return _Version(name=name, number=number, run_key=run_key, weights_sha256=weights_sha256, job=job)


def _scores(store: Store, version: _Version, on: Job) -> tuple[str, Samples]:
    """Of a version, on the held-out samples that `on` trained without, by its own recipe as it is now."""
    preset = replace(
        version.job.preset,
        data=on.preset.data,
        evaluate=on.preset.evaluate,
        launch=replace(on.preset.launch, nodes=1, min_nodes=1, processes_per_node=1, server_nodes=0, server_replicas=1),
        parallel=ParallelConfig(),  # nothing is trained, and what trained the other one may not fit it
    )

    def score() -> Samples:
        _require_fitting(store, preset, version)
        return score_samples(store, preset, on.dataset_digest, version.run_key)

    return find_or_score(
        store,
        run_key=version.run_key,
        weights_sha256=version.weights_sha256,
        dataset_digest=on.dataset_digest,
        config=on.preset.evaluate,
        score=score,
    )


def _require_fitting(store: Store, preset: Preset, version: _Version) -> None:
    """Raises `UserError` if the recipe has changed so that it cannot take these weights any more."""
    run = RunRecord(store, version.run_key)
    record = run.read()
    weights = InitialWeights(
        run_key=version.run_key,
        generation=record.generation,
        checkpoint=trusted_result(run, record).checkpoint,
        weights_sha256=version.weights_sha256,
    )
    what = f"model {version.name!r} version {version.number} cannot be scored: the weights do not fit the recipe"
    require_fitting(store, load_recipe(preset), weights, what=what)


def _proofs(settings: Settings, store: Store, policy: Policy, version: _Version) -> list[Reason]:
    proofs = []
    if policy.require_ledger:
        proofs.append(_ledger(store, version))
    if policy.require_drill:
        tags = registry.tags_of(settings.mlflow_uri, version.name, version.number)
        proofs.append(drill_proof(tags, subject=subject_of(version.job.preset, load_recipe(version.job.preset))))
    return proofs


def _ledger(store: Store, version: _Version) -> Reason:
    try:
        proof = verify_run(store, version.run_key)
    except DamagedError as error:
        return Reason(rule="ledger", passed=False, text=f"ledger: {error}")
    return Reason(rule="ledger", passed=True, text=f"ledger: {proof.num_samples_read} samples were read as ordered")


def drill_proof(tags: dict[str, str], *, subject: str) -> Reason:
    """Whether a version's tags tell of a green drill of this subject and of the code that is here."""
    state = tags.get(registry.DRILL_TAG)
    if state is None:
        return Reason(
            rule="drill", passed=False, text="drill: none is attached (`unbroken drill PRESET --attach VERSION`)"
        )
    wanted = {"subject": subject, "code": code_digest()}
    others = [name for name, digest in wanted.items() if tags.get(f"{registry.DRILL_TAG}.{name}") != digest]
    if others:
        return Reason(rule="drill", passed=False, text=f"drill: that which is attached was of another {others[0]}")
    return Reason(rule="drill", passed=state == "green", text=f"drill: {state}")


def _tell(settings: Settings, judgement: Judgement) -> None:
    """The judgement among the artifacts of the version's run, then its tags."""
    for reason in judgement.decision.reasons:
        log.info("%s %s", "passed " if reason.passed else "REFUSED", reason.text)
    tags = {
        registry.GATE_TAG: "passed" if judgement.passed else "refused",
        f"{registry.GATE_TAG}.decision": judgement.sha256,
        f"{registry.GATE_TAG}.champion": judgement.champion or "none",
        f"{registry.GATE_TAG}.reason": ("; ".join(judgement.reasons) or "all rules are met")[:MAX_REASON_CHARACTERS],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{judgement.sha256}.json"
        path.write_bytes(judgement.to_bytes())
        registry.attach_files(settings.mlflow_uri, judgement.model, judgement.version, tags, [path], folder="gate")
