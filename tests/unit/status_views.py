"""A run that was disturbed, as it is shown; and a stack with it."""

from __future__ import annotations

from dataclasses import replace

from flows.monitor.seen import Point
from flows.monitor.view import (
    AlertView,
    AttemptView,
    NodeView,
    Overview,
    RankView,
    RunView,
    Servers,
    Waiting,
)

NOW = 1_800_000_000.0
HOSTILE = "<script>alert(1)</script>\x1b[2J\"'&"
RANK = RankView(
    rank=0, step=209, loss=0.05, heard_at=NOW - 0.4, busy_seconds=0.012, collective_seconds=0.003, data_wait_seconds=0.0
)
ALERT = AlertView(
    name="NodeLost",
    severity="critical",
    run="0123456789ab",
    summary="run 0123456789ab: node 1 does not answer",
    cause="its machine, its network or its agent is gone; the others train on if launch.min_nodes allows it",
    link="http://127.0.0.1:4200/runs/flow-run/0c2b8ba8-6e5c-4a9a-a3a1-2d6a1b8a1b1c",
    since="2027-01-15T07:58:00.000Z",
)
VIEW = RunView(
    key="0123456789ab" + "c" * 52,
    model="digits",
    at=NOW,
    state="recovering",
    why="node 1: Killed: its worker was killed by signal 9",
    step=209,
    goal_steps=300,
    step_at=NOW - 1,
    steps_per_second=14.4,
    samples_per_second=3691.2,
    loss=0.0533,
    expected_end_at=NOW + 75,
    deadline_at=NOW + 70,
    began_at=NOW - 300,
    ended_at=None,
    token=3,
    num_ranks=2,
    group_nodes=1,
    wanted_nodes=2,
    engine="1 RUNNING, 1 BACKOFF",
    checkpoint_step=200,
    checkpoint_at=NOW - 7,
    checkpoint_every_steps=25,
    num_attempts=2,
    num_departures=2,
    num_failures=1,
    last_departure={"node": "1", "class": "Killed", "cause": "its worker was killed by signal 9"},
    attempts=(
        AttemptView(
            number=1, token=1, began="2027-01-15T07:55:00.000+00:00", num_ranks=2, from_step=0, source="start",
            why_it_ended="node 1: Killed: its worker was killed by signal 9",
        ),
        AttemptView(number=2, token=3, began="", num_ranks=None, from_step=104, source="memory", why_it_ended=""),
    ),
    seconds={"productive": 200.0, "redone": 9.0, "recovery": 11.0, "waiting": 30.0, "checkpoint": 4.0},
    notes=("node 1 is slow: rank 1 takes 2.3 times as long",),
    curve=tuple(Point(step=s, time=NOW, loss=2.0 / s, samples_per_second=3600.0) for s in range(1, 210)),
    links={
        "Prefect": "http://127.0.0.1:4200/runs/flow-run/0c2b8ba8-6e5c-4a9a-a3a1-2d6a1b8a1b1c",
        "S3": "s3://unbroken/runs/0123/0/",
    },
    nodes=(
        NodeView(
            node=0, address="10.0.0.1", is_answering=True, is_training=True, num_peers=1, memory_used_share=0.43,
            disk_free_bytes=43e9, ranks=(RANK, replace(RANK, rank=1)),
        ),
        NodeView(node=1, address="10.0.0.2", is_answering=False),
    ),
    alerts=(ALERT,),
)  # fmt: skip
SERVERS = Servers(
    at=NOW,
    up={"s3": True, "mlflow": True, "prefect": False},
    flow_runs={"running": 2, "completed": 14},
    waiting=(Waiting(name="brave-otter", queue="urgent", state="Late", seconds=95.0, link="http://127.0.0.1:4200/x"),),
    alerts=(ALERT,),
)
OVERVIEW = Overview(
    at=NOW,
    runs=(VIEW,),
    servers=SERVERS,
    disk_bytes=400 * 10**9,
    disk_free_bytes=120 * 10**9,
    links=VIEW.links,
)
HOSTILE_VIEW = replace(
    VIEW,
    key=HOSTILE,
    model=HOSTILE,
    why=HOSTILE,
    engine=HOSTILE,
    notes=(HOSTILE,),
    attempts=(replace(VIEW.attempts[0], source=HOSTILE, why_it_ended=HOSTILE, began=HOSTILE),),
    links={HOSTILE: HOSTILE, "page": "javascript:alert(1)"},
    nodes=(replace(VIEW.nodes[0], address=HOSTILE),),
    alerts=(AlertView(**dict.fromkeys(("name", "severity", "run", "summary", "cause", "link", "since"), HOSTILE)),),
)
HOSTILE_OVERVIEW = replace(
    OVERVIEW,
    runs=(HOSTILE_VIEW, replace(HOSTILE_VIEW, state="waiting")),
    servers=replace(
        SERVERS,
        up={HOSTILE: False},
        flow_runs={HOSTILE: 1},
        waiting=(Waiting(name=HOSTILE, queue=HOSTILE, state=HOSTILE, seconds=1.0, link=f"javascript:{HOSTILE}"),),
        alerts=HOSTILE_VIEW.alerts,
    ),
    links=HOSTILE_VIEW.links,
)
