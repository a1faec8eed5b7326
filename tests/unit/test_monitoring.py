"""Rules, windows and both configurations, judged by the programs that read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.monitoring.render import CONSEQUENCES, FOLDER, OF_ALL_RUNS, WINDOWS, read_windows, rules, write_configs
from tests.faults.alerting import SHORT
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
    seconds = {name: _seconds(windows[name]) for name in windows}
    rate_falls = (1 - windows["throughput_share"]) * seconds["rate"]  # so long after nothing is done any more
    assert seconds["stalled"] + seconds["look"] < rate_falls + seconds["throughput"]
    assert seconds["straggler"] < seconds["throughput"]
    assert seconds["node_lost"] + seconds["look"] < seconds["nodes_missing"]
    assert seconds["linger"] > seconds["rate"] + seconds["look"]
    assert seconds["group_wait"] > seconds["look"], "two that see the same disk look at it one after the other"


def _seconds(window: Any) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    return float(window[:-1]) * units[window[-1]] if isinstance(window, str) else float(window)


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
