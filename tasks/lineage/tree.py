"""A lineage as a tree: for a terminal, and as Markdown for the version's page in MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tasks.lineage.facts import Code, Data, Gate, Lineage, Training
from tasks.provenance import Start

MAX_DESCRIPTION_CHARACTERS = 5000
"""MLflow keeps no more of a version's description."""


@dataclass(frozen=True)
class Node:
    """One line, and what belongs to it."""

    text: str
    children: Sequence[Node] = ()


def tree_of(lineage: Lineage) -> Node:
    """What a person reads."""
    kept = lineage.kept
    model_file = Node(
        f"model file sha256 {kept.model_sha256}, {kept.num_bytes:,} bytes",
        [Node(f"weights sha256 {kept.weights_sha256}")],
    )
    children = [model_file, _standing(lineage), _gate(lineage.gate)]
    if lineage.training is not None:
        children.append(_training(lineage.training))
    if lineage.data is not None:
        children.append(_data(lineage.data))
    if lineage.code is not None:
        children.append(_code(lineage.code))
    if lineage.links:
        children.append(Node("links", [Node(f"{name}: {url}") for name, url in lineage.links.items()]))
    if lineage.unknown:
        children.append(Node("not known", [Node(text) for text in lineage.unknown]))
    return Node(f"model {kept.model} version {kept.version}", children)


def terminal_lines(node: Node) -> Iterator[str]:
    yield node.text
    for number, child in enumerate(node.children, start=1):
        first, other = ("└─ ", "   ") if number == len(node.children) else ("├─ ", "│  ")
        lines = terminal_lines(child)
        yield first + next(lines)
        yield from (other + line for line in lines)


def markdown(node: Node) -> str:
    """A nested list. What is cut to fit a description is said to be."""
    lines = list(_markdown_lines(node.children, depth=0))
    end = "- … (the rest: `unbroken models why`)"
    size = 0
    for number, line in enumerate(lines):
        size += len(line) + 1
        if size > MAX_DESCRIPTION_CHARACTERS - len(end) - 100:
            return "\n".join([*lines[:number], end])
    return "\n".join(lines)


def _markdown_lines(nodes: Sequence[Node], *, depth: int) -> Iterator[str]:
    for node in nodes:
        yield f"{'  ' * depth}- {node.text}"
        yield from _markdown_lines(node.children, depth=depth + 1)


def _standing(lineage: Lineage) -> Node:
    if not lineage.history:
        return Node("never was champion")
    entries = [
        Node(f"change {e.sequence}: {e.action} by {e.by}, {e.when}" + (f": {e.reason}" if e.reason else ""))
        for e in lineage.history
    ]
    return Node("champion" if lineage.is_champion else "was champion", entries)


def _gate(maybe_gate: Gate | None) -> Node:
    if maybe_gate is None:
        return Node("gate: nothing was judged")
    against = f"against version {maybe_gate.champion}" if maybe_gate.champion else "without a champion"
    head = f"gate: {'passed' if maybe_gate.passed else 'refused'} {against}, decision {maybe_gate.decision_sha256}"
    return Node(head, [Node(reason) for reason in maybe_gate.reasons])


def _training(training: Training) -> Node:
    preset = training.preset
    children = [
        Node("environment", [Node(f"{name}: {value}") for name, value in sorted(training.environment.items())]),
        Node(
            "attempts",
            [
                Node(f"token {a['token']}: {a['ranks'] or '?'} ranks from step {a['from_step']}; {a['why_it_ended']}")
                for a in training.attempts
            ],
        ),
        Node("checkpoints", [Node(f"step {c.step}: {c.sha256}") for c in training.checkpoints]),
        Node(
            f"preset {preset['name']}, seed {preset['seed']}",
            [
                Node(f"{table}: {', '.join(f'{name} = {value!r}' for name, value in preset[table].items())}")
                for table in ("train", "hyperparameters", "data", "evaluate", "launch", "parallel")
            ],
        ),
    ]
    if training.quarantined:
        damaged = [Node(f"step {q.checkpoint.step}: {q.reason}") for q in training.quarantined]
        children.insert(3, Node("damaged checkpoints", damaged))
    if training.inexact is not None:
        children.insert(0, Node(f"not exact ({training.inexact}): done again, it gives another result"))
    if training.initial is not None:
        initial = training.initial
        children.append(Node(f"began with the weights {initial.weights_sha256} of run {initial.run_key}"))
    if training.continued is not None:
        continued = training.continued
        children.append(Node(f"took over steps 1 to {continued.step} from run {continued.run_key}"))
    return Node(f"run {training.run_key}, generation {training.generation}, {training.steps} steps", children)


def _data(data: Data) -> Node:
    order = f"order: seed {data.order_seed}, batches of {data.batch_size} over {data.virtual_workers} virtual workers"
    children = [Node(f"{order}, windows of {data.shuffle_window_shards} shards")]
    children += [
        Node(f"{split}: {len(shards)} shards", [Node(f"{s.sha256}, {s.num_samples:,} samples") for s in shards])
        for split, shards in data.shards.items()
    ]
    return Node(f"dataset {data.name} {data.digest}", children)


def _code(code: Code) -> Node:
    children = [Node(f"{name}: {sha256}") for name, sha256 in code.sources.items()]
    children += [_start(start) for start in code.starts]
    if code.recipe_source is None:
        return Node(f"recipe {code.recipe}; an earlier release kept no source of it", children)
    return Node(f"recipe {code.recipe}, source {code.recipe_source}, numerics {code.numerics_version}", children)


def _start(start: Start) -> Node:
    children = [Node(f"commit {start.commit}")]
    if start.changes_sha256 is not None:
        children.append(Node(f"changes to it: sha256 {start.changes_sha256}"))
    if start.flow_run is not None:
        children.append(Node(f"Prefect flow run {start.flow_run}"))
    if start.dvc is not None:
        experiment = f", experiment {start.dvc.experiment}" if start.dvc.experiment else ""
        children.append(Node(f"DVC stage {start.dvc.stage}, revision {start.dvc.revision}{experiment}"))
    return Node(f"started by {start.by} (generation {start.generation})", children)
