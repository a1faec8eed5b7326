"""The cost model of benchmarks/scale agrees with what was counted, and with what the code does now."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environments import ROOT
from benchmarks.scale import commits, crowd, lifted, limits, model
from benchmarks.scale.__main__ import POINTS
from benchmarks.scale.counting import name_of
from benchmarks.scale.figure import COLOURS, cores_alone, draw
from benchmarks.scale.messages import member, node_of_all, status
from benchmarks.scale.model import HOUR, Run, Traffic
from benchmarks.scale.report import NODE_COUNTS, as_markdown, at
from training.cluster.protocol import ReadRecord, RecordSeen, Renew, Tick
from training.documents import canonical_json
from training.runs.events import Event
from training.runs.record import Record
from training.runs.system import SAMPLE_SECONDS
from training.s3.objectstore import Store

FOUND: dict[str, Any] = json.loads(POINTS.read_text())
BOUND = 0.1
NUM_PUNCTUAL, MOST_PUNCTUAL_CHANGE, LEAST_OF_THE_BUSY = 8, 32, 0.6
"""So many agents did their looks in time, and their changes, on the two cores that all shared with other work; and what
was left of the others' looks and beats."""
AGENTS = [pytest.param(point, id=f"{point['num_nodes']} agents") for point in FOUND["agents"]]


def requests(counted: dict[str, Any], name: str) -> int:
    return int(counted.get(name, (0, 0))[0])


def one_rank_each(num_nodes: int, **about: int) -> Run:
    return Run(num_nodes=num_nodes, ranks_per_node=1, **about)


@pytest.mark.parametrize("point", AGENTS)
def test_at_rest_agents_ask_for_what_the_model_says(point: dict[str, Any]) -> None:
    """On a busy machine for less: the next look comes so long after the answer."""
    rest, run = point["rest"], one_rank_each(point["num_nodes"])
    hours = rest["seconds"] / HOUR
    expected = model.rest(run)
    gets, puts = (requests(rest["requests"], f"record {method}") for method in ("GET", "PUT"))
    least = 1 - BOUND if run.num_nodes <= NUM_PUNCTUAL else LEAST_OF_THE_BUSY
    assert least * expected.num_gets * hours - 2 <= gets <= (1 + BOUND) * expected.num_gets * hours
    assert puts == pytest.approx(expected.num_puts * hours, abs=1.1)
    num_samples = run.num_nodes * rest["seconds"] / SAMPLE_SECONDS
    assert requests(rest["requests"], "system PUT") == pytest.approx(num_samples, abs=run.num_nodes)
    if point["start"]["token"] == 1:  # else the record has a history
        assert rest["requests"]["record GET"][1] / gets == pytest.approx(model.record_bytes(run.num_nodes), abs=150)


@pytest.mark.parametrize("point", [point for point in AGENTS if "lost" in point.values[0]])
def test_agents_tell_one_another_what_the_model_says(point: dict[str, Any]) -> None:
    rest, num_nodes = point["rest"], point["num_nodes"]
    a_beat = limits.messages_per_second(num_nodes) / limits.BEATS_PER_SECOND
    beats = rest["num_messages"] / a_beat
    assert (LEAST_OF_THE_BUSY if num_nodes > 2 else 1 - BOUND) <= beats * point["beat_seconds"] / rest["seconds"] <= 1.2
    assert rest["num_heard"] == pytest.approx(rest["num_messages"], rel=BOUND)
    assert rest["message_bytes"] / rest["num_messages"] == pytest.approx(limits.message_bytes(num_nodes), rel=BOUND)
    assert limits.num_descriptors(num_nodes) - 6 <= rest["num_descriptors"] <= limits.num_descriptors(2 * num_nodes)


@pytest.mark.parametrize("point", [point for point in AGENTS if "lost" in point.values[0]])
def test_a_change_is_one_proposal_and_a_read_of_each_survivor(point: dict[str, Any]) -> None:
    lost, num_left = point["lost"], point["num_nodes"] - 1
    polls = num_left * (1 + lost["seconds"] / model.POLL_SECONDS)
    assert num_left <= requests(lost["requests"], "record GET") <= num_left + polls
    assert requests(lost["requests"], "record PUT") <= 2  # the other one is a sign of life
    if point["num_nodes"] <= MOST_PUNCTUAL_CHANGE:
        assert requests(lost["requests"], "record PUT refused") == 0


def test_an_hour_of_a_node_is_what_the_model_says() -> None:
    """With a store that answers at once, and the node's own code."""
    node, asked = node_of_all(1, "training"), Counter[type]()
    for tenth in range(10 * HOUR):
        actions = node.handle(Tick(), tenth / 10)
        while asking := [action for action in actions if isinstance(action, ReadRecord | Renew)]:
            asked[type(asking[0])] += 1
            actions = node.handle(RecordSeen(maybe_record=node.maybe_record), tenth / 10)
    expected = model.rest(one_rank_each(1))
    assert asked[Renew] == pytest.approx(expected.num_puts, rel=BOUND)
    assert asked[Renew] + asked[ReadRecord] == pytest.approx(expected.num_gets, rel=BOUND)


@pytest.mark.parametrize("point", [pytest.param(p, id=f"{p['num_ranks']} ranks") for p in FOUND["commits"]])
def test_commits_are_exactly_what_was_counted(point: dict[str, Any]) -> None:
    require_commit(point)


def require_commit(point: dict[str, Any]) -> None:
    run = one_rank_each(point["num_ranks"], num_tensors=point["num_tensors"], state_bytes=commits.NUM_BYTES)
    for part, expected in (("commit", model.commit(run)), ("load", model.load(run))):
        counted = {name: found for name, found in point[part].items() if not name.startswith("events")}
        by_method = {
            method: sum(found[0] for name, found in counted.items() if name.endswith(method))
            for method in ("GET", "PUT", "LIST", "DELETE")
        }
        found = tuple(by_method.values())
        assert found == (expected.num_gets, expected.num_puts, expected.num_lists, expected.num_deletes)
        moved = sum(
            found[1] for name, found in counted.items() if name.startswith("checkpoints") and "LIST" not in name
        )
        bytes_of_record = 2 * model.record_bytes(run.num_nodes)
        assert moved == pytest.approx(expected.num_bytes - bytes_of_record, rel=2 * BOUND)


def test_commits_of_the_code_as_it_is(store: Store) -> None:
    require_commit(commits.measure(3, store.location))


def test_what_the_code_writes_is_as_long_as_the_model_says() -> None:
    for num_nodes in (1, 64, 1024):
        record = Record(key="0" * 64, instance="0" * 32, secret="0" * 64, token=9, num_nodes=num_nodes)
        record = replace(record, members=tuple(map(member, range(num_nodes))))
        size = len(canonical_json({**asdict(record), "format": 1, "version": 9, "nonce": "0" * 97}))
        assert size == pytest.approx(model.record_bytes(num_nodes), rel=BOUND)
        told = len(canonical_json(asdict(status(0, num_nodes)))) + 66
        assert told == pytest.approx(limits.message_bytes(num_nodes), rel=BOUND)
    names = ("loss", "grad_norm", "learning_rate", "samples_per_second", "seconds")
    values = dict.fromkeys(names, 0.12345678901234567)
    without = len(Event(kind="step", time=1790000000.123456, token=1, step=1000, values=values).to_line())
    line = Event(
        kind="step", time=1790000000.123456, token=1, step=1000, values={**values, "samples": "0" * 16}
    ).to_line()
    assert without == pytest.approx(model.STEP_BYTES, rel=BOUND)
    assert len(line) - without == model.LEDGER_BYTES


def test_in_simulated_time_more_nodes_make_no_more_proposals() -> None:
    for point in [crowd.measure(6), *FOUND["crowds"]]:
        num_nodes = point["num_nodes"]
        for part in ("start", "change", "arrival"):
            assert point[part]["groups"] == 1
            assert "late proposals" not in point[part]
        all_told = num_nodes * limits.start_messages(num_nodes)
        assert all_told <= point["start"]["messages"] <= 1.6 * all_told


def test_messages_cost_what_was_measured() -> None:
    """Times, as they were measured once: so the model's line through them is checked, and not this machine."""
    for point in FOUND["messages"]:
        if 8 <= point["num_nodes"] <= 1024:  # beyond, they cost up to twice as much: memory is slower than caches
            modelled = limits.agent_nanoseconds_per_second(point["num_nodes"]) / limits.SECOND
            assert modelled == pytest.approx(cores_alone(point), rel=0.35)


def test_every_hour_is_counted_in_integers_and_grows_with_the_nodes() -> None:
    for kinds in (model.KINDS, lifted.KINDS):
        for traffic in kinds.values():
            costs = [traffic(at(num_nodes)) for num_nodes in NODE_COUNTS]
            assert all(type(value) is int for cost in costs for value in asdict(cost).values())
            assert [cost.nanodollars for cost in costs] == sorted(cost.nanodollars for cost in costs)
    total = sum((traffic(at(16_384)) for traffic in lifted.KINDS.values()), Traffic())
    assert 100 * total.nanodollars < model.membership(at(16_384)).nanodollars


def test_limits_are_met_in_order_and_each_holds_up_to_its_own() -> None:
    found = list(limits.in_order(at(1)))
    assert [most for most, _ in found] == sorted(most for most, _ in found)
    for most, limit in found:
        assert limit.is_within(at(most))
        assert not limit.is_within(at(most + 1))


def test_requests_are_named_by_what_they_are_for() -> None:
    assert name_of("GET", "/b/p/runs/0/record.json", 200) == "record GET"
    assert name_of("GET", "/b?list-type=2&prefix=p%2Fruns%2F0%2F0%2Fnodes%2F", 200) == "nodes LIST"
    assert name_of("PUT", "/b/p/runs/0/record.json", 412) == "record PUT refused"


def test_the_page_and_the_figure_are_made_from_the_same_numbers(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        draw(FOUND, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert all(kind in (tmp_path / "one.svg").read_text() for kind in COLOURS)
    page = (ROOT / "docs" / "scale.md").read_text()
    assert all(row in page for row in as_markdown(FOUND).splitlines())
