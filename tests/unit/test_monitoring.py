"""Rules, windows and both configurations, judged by the programs that read them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.monitor.servers import answers
from infra.local.ports import free_port
from infra.monitoring.render import (
    CONSEQUENCES,
    FOLDER,
    OF_ALL_RUNS,
    WINDOWS,
    read_windows,
    rules,
    seconds_of,
    write_configs,
)
from tests.faults.alerting import ALERTMANAGER, SHORT
from tests.waiting import wait_until
from training.errors import UserError

PORTS = {"monitor": 1, "prometheus": 2, "alertmanager": 3}
RULES = rules(read_windows())
ALERTS = [rule["alert"] for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"] if "alert" in rule]
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="Prometheus is not installed")
needs_amtool = pytest.mark.skipif(not shutil.which("amtool"), reason="Alertmanager is not installed")


def promtool(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """What it says to the tests of the rules, with these rules."""
    (folder / "rules.yaml").write_text(text)
    (folder / "rules_test.yaml").write_text((FOLDER / "rules_test.yaml").read_text())
    return subprocess.run(
        ["promtool", "test", "rules", "rules_test.yaml"], cwd=folder, capture_output=True, text=True, check=False
    )


@needs_promtool
def test_each_rule_does_what_it_should(tmp_path: Path) -> None:
    done = promtool(tmp_path, RULES)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_no_rule_can_be_lost_unnoticed(tmp_path: Path) -> None:
    """If none ever fires, the tests of the rules miss each of them."""
    document = yaml.safe_load(RULES)
    for group in document["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = "vector(0) > 1"
    done = promtool(tmp_path, yaml.safe_dump(document))
    assert done.returncode != 0
    assert [alert for alert in ALERTS if alert not in done.stdout + done.stderr] == []


def test_every_alert_says_what_and_why() -> None:
    for group in yaml.safe_load(RULES)["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert set(rule["annotations"]) == {"summary", "cause", "link"}, rule["alert"]
                assert rule["labels"]["severity"] in ("warning", "critical")
    named = {*CONSEQUENCES, *(name for follows in [*CONSEQUENCES.values(), *OF_ALL_RUNS.values()] for name in follows)}
    assert named <= set(ALERTS), "an inhibition names an alert that there is"


def test_the_page_of_alerts_names_each() -> None:
    page = (FOLDER.parents[1] / "docs" / "monitoring.md").read_text()
    assert [alert for alert in ALERTS if f"`{alert}`" not in page] == []


def test_every_metric_of_a_rule_is_in_the_page() -> None:
    page = (FOLDER.parents[1] / "docs" / "monitoring.md").read_text()
    metrics = set(re.findall(r"(?<![:\w])unbroken_(?:rank|node|run|stack|service|serving)_\w+", RULES))
    assert {metric for metric in metrics if f"`{metric}`" not in page and "serving_seconds" not in metric} == set()


@needs_promtool
@needs_amtool
def test_both_programs_take_their_configurations(tmp_path: Path) -> None:
    (tmp_path / "slack").write_text("https://hooks.example/x")
    settings = {
        "webhook": "http://127.0.0.1:9/hook",
        "slack_url_file": str(tmp_path / "slack"),
        "slack_channel": "#runs",
        "email_to": "a@example.org",
        "email_from": "b@example.org",
        "smtp": "127.0.0.1:25",
        "smtp_user": "b",
        "smtp_password_file": str(tmp_path / "password"),
        "serving": ["127.0.0.1:8000"],
    }
    digests = write_configs(tmp_path, PORTS, settings)
    (tmp_path / "nodes.json").write_text("[]")
    for command in (
        ["promtool", "check", "config", "prometheus.yaml"],
        ["amtool", "check-config", "alertmanager.yaml"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "hooks.example" not in (tmp_path / "alertmanager.yaml").read_text(), "Slack's address stays in its file"
    assert (tmp_path / "alertmanager.yaml").stat().st_mode & 0o077 == 0
    assert write_configs(tmp_path, PORTS, settings) == digests
    assert write_configs(tmp_path, PORTS, {})["alertmanager"] != digests["alertmanager"]


@contextmanager
def alertmanager(folder: Path) -> Iterator[str]:
    """The address of one with these rules of inhibition, which tells nobody that is there."""
    write_configs(folder, PORTS, {})
    port = free_port()
    command = [str(ALERTMANAGER), f"--config.file={folder}/alertmanager.yaml", f"--storage.path={folder}/am"]
    listens = [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
    with subprocess.Popen([*command, *listens], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/-/ready"), what="Alertmanager to be ready")
            yield f"http://127.0.0.1:{port}/api/v2/alerts"
        finally:
            process.terminate()


def left_to_tell(url: str, alerts: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of those that are not inhibited, once all are there. Then all are over.

    Who inhibits is noted beside, one alert after another: once the last inhibits the first, all have been.
    """
    now, run = datetime.now(UTC), f"last {os.urandom(4).hex()}"
    first, last = ({"alertname": name, "run": run} for name in ("Straggler", "Stalled"))
    alerts = [first, *alerts, last]
    _post(url, [{"labels": labels, "startsAt": now.isoformat()} for labels in alerts])
    assert len(_get(url)) == len(alerts)
    wait_until(lambda: first not in _labels_left(url), what="the last alert to be noted")
    left = [labels for labels in _labels_left(url) if labels.get("run") != run]
    _post(url, [{"labels": labels, "startsAt": now.isoformat(), "endsAt": now.isoformat()} for labels in alerts])
    wait_until(lambda: not _get(url), what="the alerts to be over")
    return sorted(f"{labels['alertname']} {labels.get('run', '')}" for labels in left)


def _labels_left(url: str) -> list[dict[str, str]]:
    return [each["labels"] for each in _get(f"{url}?inhibited=false")]


def _get(url: str) -> Any:
    with urllib.request.urlopen(url) as reply:
        return json.load(reply)


def _post(url: str, document: Any) -> None:
    body = json.dumps(document).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})):
        pass


@pytest.mark.skipif(not ALERTMANAGER, reason="Alertmanager is not installed")
def test_of_one_cause_one_alert_is_left_to_tell(tmp_path: Path) -> None:
    """And of another run, another node's disk or another server, all."""
    of_run = [name for name in ALERTS if name not in ("ServiceAway", "MonitorAway", "LiveModelRegressed")]
    chain = ["LossNotFinite", "RepeatedFailure", "NodeLost", "Stalled", "CheckpointTooOld"]
    here, there = {"device": "boot-1"}, {"device": "boot-2"}
    stack_disk = {"alertname": "DiskNearlyFull", **here}
    cases: list[tuple[list[dict[str, str]], list[str]]] = [
        ([{"alertname": name, "run": "a"} for name in of_run], ["DiskNearlyFull a", "LossNotFinite a"]),
        ([{"alertname": name, "run": name} for name in chain], sorted(f"{name} {name}" for name in chain)),
        (
            [stack_disk, *({"alertname": "DiskNearlyFull", "run": run, **here} for run in "ab")],
            ["DiskNearlyFull "],
        ),
        (
            [stack_disk, {"alertname": "DiskNearlyFull", "run": "a", **there}],
            ["DiskNearlyFull ", "DiskNearlyFull a"],
        ),
        ([stack_disk, {"alertname": "CheckpointTooOld", "run": "a"}], ["DiskNearlyFull "]),
        (
            [{"alertname": "ServiceAway", "service": "s3"}, *({"alertname": "Stalled", "run": run} for run in "ab")],
            ["ServiceAway "],
        ),
        (
            [{"alertname": "ServiceAway", "service": "mlflow"}, {"alertname": "Stalled", "run": "a"}],
            ["ServiceAway ", "Stalled a"],
        ),
        (
            [{"alertname": "MonitorAway", "service": "monitor"}, {"alertname": "NodeLost", "run": "a", "node": "1"}],
            ["MonitorAway "],
        ),
    ]
    with alertmanager(tmp_path) as url:
        for alerts, expected in cases:
            assert left_to_tell(url, alerts) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"email_to": "a@example.org"}, "email_from"),
        ({"slack_channel": "#x"}, "slack_url_file"),
        ({"webhook": "ftp://x"}, "http://"),
    ],
)
def test_a_receiver_that_is_half_named_is_refused(tmp_path: Path, settings: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        write_configs(tmp_path, PORTS, settings)


@pytest.mark.parametrize("changes", [{}, SHORT], ids=["shipped", "of the fault tests"])
def test_what_is_worse_is_noticed_sooner_than_what_follows_from_it(changes: Mapping[str, Any]) -> None:
    """Else one cause would be two messages."""
    windows = {**read_windows(), **changes}
    seconds = {
        name: seconds_of(windows[name]) if isinstance(windows[name], str) else float(windows[name]) for name in windows
    }
    rate_falls = (1 - windows["throughput_share"]) * seconds["rate"]  # so long after nothing is done any more
    assert seconds["stalled"] + seconds["look"] < rate_falls + seconds["throughput"]
    assert seconds["straggler"] < seconds["throughput"]
    assert seconds["node_lost"] + seconds["look"] < seconds["nodes_missing"]
    assert seconds["linger"] > seconds["rate"] + seconds["look"]
    assert seconds["linger_worst"] > 2 * seconds["linger"]
    assert seconds["group_wait"] > seconds["look"], "two that see the same disk look at it one after the other"


def test_windows_must_be_complete(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_text(WINDOWS.read_text().replace("stalled = 120", "staled = 120"))
    with pytest.raises(UserError, match="unknown: staled"):
        read_windows(path)
    path.write_text(WINDOWS.read_text().replace("stalled = 120", ""))
    with pytest.raises(UserError, match="missing: stalled"):
        read_windows(path)
    with pytest.raises(UserError, match=r"none\.toml"):
        read_windows(tmp_path / "none.toml")


@pytest.mark.parametrize(("duration", "seconds"), [("10s", 10.0), ("1m30s", 90.0), ("250ms", 0.25), ("1h", 3600.0)])
def test_a_duration_is_prometheus_own(duration: str, seconds: float) -> None:
    assert seconds_of(duration) == seconds


@pytest.mark.parametrize("duration", ["", "10", "ten seconds", "10s ", "-5s", "1.5s"])
def test_no_duration_is_refused_by_what_it_is(duration: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(duration))):
        seconds_of(duration)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("look = 10", "look: 10 is no duration"),
        ('straggler = "soon"', "straggler: 'soon' is no duration"),
        ('disk_free = "5%"', "disk_free = '5%' must be a number above 0"),
        ("repeated = -1", "repeated = -1 must be a number above 0"),
    ],
)
def test_a_window_of_no_use_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "windows.toml"
    path.write_text(re.sub(rf"^{line.split()[0]} = .*$", line, WINDOWS.read_text(), flags=re.MULTILINE))
    with pytest.raises(UserError, match=re.escape(f"{path}: {said}")):
        read_windows(path)
