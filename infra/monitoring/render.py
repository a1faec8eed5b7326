"""The configuration of Prometheus and Alertmanager, made of the rules, the windows and the settings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from infra.local.files import write_whole
from training.documents import digest_of, read_toml
from training.errors import UserError

FOLDER = Path(__file__).parent
WINDOWS = FOLDER / "windows.toml"
UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
RUN_ALERTS = ("NodesMissing", "Straggler", "ThroughputFell", "CheckpointTooOld", "DeadlineWillBeMissed")
"""That may follow from a worse one of the same run."""
CONSEQUENCES: Mapping[str, Sequence[str]] = {
    "LossNotFinite": ("RepeatedFailure", "NodeLost", "Stalled", *RUN_ALERTS),
    "RepeatedFailure": ("NodeLost", "Stalled", *RUN_ALERTS),
    "NodeLost": ("Stalled", *RUN_ALERTS),
    "Stalled": RUN_ALERTS,
    "NodesMissing": ("ThroughputFell", "DeadlineWillBeMissed"),
    "Straggler": ("ThroughputFell", "DeadlineWillBeMissed"),
    "ThroughputFell": ("DeadlineWillBeMissed",),
}
"""What each alert makes superfluous, of the same run."""
OF_ALL_RUNS: Mapping[tuple[str, str], Sequence[str]] = {
    ("ServiceAway", 'service="s3"'): (
        "CheckpointTooOld",
        "Stalled",
        "ThroughputFell",
        "DeadlineWillBeMissed",
        "RepeatedFailure",
    ),
    ("DiskNearlyFull", 'run=""'): ("CheckpointTooOld",),
    ("MonitorAway", 'service="monitor"'): ("NodeLost",),
}
"""What is wrong with the stack makes superfluous, of any run: an alert and which one of it, and what follows. The local
store is on the stack's disk; nobody but the monitor knows that a run is over, so that its agents may go."""
SAME_DISK = {
    "source_matchers": ['alertname="DiskNearlyFull"', 'run=""'],
    "target_matchers": ['alertname="DiskNearlyFull"', 'run!=""'],
    "equal": ["device"],
}
"""On one machine the disk of the stack is that of the nodes too."""


@dataclass(frozen=True, kw_only=True)
class Receivers:
    """Who is told. Passwords and Slack's address are in files of their own, which these name."""

    webhook: str = ""
    slack_url_file: str = ""
    slack_channel: str = ""
    email_to: str = ""
    email_from: str = ""
    smtp: str = ""
    """host:port"""
    smtp_user: str = ""
    smtp_password_file: str = ""

    def __post_init__(self) -> None:
        _require(bool(self.email_to) == bool(self.smtp and self.email_from), "email_to, email_from and smtp")
        _require(bool(self.slack_url_file) == bool(self.slack_channel), "slack_url_file and slack_channel")
        _require(bool(self.smtp_user) == bool(self.smtp_password_file), "smtp_user and smtp_password_file")
        if self.smtp and not re.fullmatch(r"\S+:\d+", self.smtp):
            raise UserError(f"[monitoring] smtp = {self.smtp!r} must be host:port")
        if self.webhook and not self.webhook.startswith(("http://", "https://")):
            raise UserError(f"[monitoring] webhook = {self.webhook!r} must begin with http:// or https://")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the parts listen, as host:port, and what lists the agents."""

    monitor: str
    alertmanager: str
    nodes_file: Path
    serving: Sequence[str] = field(default_factory=tuple)


def read_windows(path: Path = WINDOWS) -> dict[str, Any]:
    """Raises `UserError` naming the file and what is missing, unknown or of no use in it."""
    found, known = read_toml(path), read_toml(WINDOWS)
    for words, names in (("unknown", found.keys() - known.keys()), ("missing", known.keys() - found.keys())):
        if names:
            raise UserError(f"{path}: {words}: {', '.join(sorted(names))} (see {WINDOWS})")
    for name, value in found.items():
        _require_like(value, known[name], where=f"{path}: {name}")
    return found


def _require_like(value: Any, shipped: Any, *, where: str) -> None:
    """A duration, or a number."""
    if isinstance(shipped, str):
        try:
            seconds_of(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where} = {value!r:.80} must be a number above 0, as the {shipped!r} that is shipped")


def seconds_of(duration: Any) -> float:
    """Of Prometheus's way to write them: 10s, 1m30s. Raises `UserError`."""
    parts = re.findall(r"([0-9]{1,9})(ms|s|m|h|d)", duration) if isinstance(duration, str) else []
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise UserError(f"{duration!r:.80} is no duration: write 10s or 1m30s, say")
    return float(sum(int(number) * UNIT_SECONDS[unit] for number, unit in parts))


def windows_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that `[monitoring]` names, or else the shipped ones. Raises `UserError`."""
    return read_windows(Path(settings["windows"]) if "windows" in settings else WINDOWS)


def write_configs(folder: Path, ports: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, str]:
    """The files of both programs, whose digests are returned by name. Raises `UserError` for a wrong setting."""
    windows = windows_of(settings)
    names = {each.name for each in fields(Receivers)}
    receivers = Receivers(**{name: value for name, value in settings.items() if name in names})
    at = {name: f"127.0.0.1:{ports[name]}" for name in ("monitor", "alertmanager")}
    places = Places(nodes_file=folder / "nodes.json", serving=tuple(settings.get("serving", ())), **at)
    rules_file = folder / "rules.yaml"
    texts = {
        "rules": rules(windows),
        "prometheus": prometheus(windows, places, rules_file),
        "alertmanager": alertmanager(windows, receivers, monitor=at["monitor"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        path = folder / f"{name}.yaml"
        if not path.exists() or path.read_text() != text:
            write_whole(path, text, mode=0o600)  # a webhook's address may be a secret
    return {
        "prometheus": digest_of([texts["prometheus"], texts["rules"]]),
        "alertmanager": digest_of(texts["alertmanager"]),
    }


def rules(windows: Mapping[str, Any]) -> str:
    return re.sub(r"%\{(\w+)\}", lambda found: str(windows[found[1]]), (FOLDER / "rules.yaml").read_text())


def prometheus(windows: Mapping[str, Any], places: Places, rules_file: Path) -> str:
    jobs: list[dict[str, Any]] = [
        {
            "job_name": "unbroken_node",
            "file_sd_configs": [{"files": [str(places.nodes_file)], "refresh_interval": windows["look"]}],
        },
        {
            "job_name": "unbroken_monitor",
            "static_configs": [{"targets": [places.monitor]}],
        },
    ]
    if places.serving:
        jobs.append({"job_name": "unbroken_serving", "static_configs": [{"targets": list(places.serving)}]})
    look = windows["look"]
    document = {
        "global": {"scrape_interval": look, "scrape_timeout": look, "evaluation_interval": look},
        "rule_files": [str(rules_file)],
        "scrape_configs": jobs,
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [places.alertmanager]}]}]},
    }
    return json.dumps(document, indent=1)


def alertmanager(windows: Mapping[str, Any], receivers: Receivers, *, monitor: str) -> str:
    """One message for each run that something is wrong with, one for the stack, and one for each server of a model; the
    monitor makes a Prefect event of it too."""
    document = {
        "route": {
            "receiver": "all",
            "group_by": ["run", "server"],
            "group_wait": windows["group_wait"],
            "group_interval": windows["group_interval"],
            "repeat_interval": windows["repeat_interval"],
        },
        "inhibit_rules": list(_inhibitions()),
        "receivers": [{"name": "all", **_receiver(receivers, f"http://{monitor}/alerts")}],
    }
    return json.dumps(document, indent=1)


def _inhibitions() -> list[dict[str, Any]]:
    of_a_run = [
        {
            "source_matchers": [f'alertname="{worse}"'],
            "target_matchers": [f'alertname=~"{"|".join(follows)}"'],
            "equal": ["run"],
        }
        for worse, follows in CONSEQUENCES.items()
    ]
    of_all = [
        {
            "source_matchers": [f'alertname="{worse}"', which],
            "target_matchers": [f'alertname=~"{"|".join(follows)}"'],
        }
        for (worse, which), follows in OF_ALL_RUNS.items()
    ]
    return [*of_a_run, *of_all, SAME_DISK]


EACH = "{{ .Annotations.summary }}\nlikely cause: {{ .Annotations.cause }}\n{{ .Annotations.link }}\n"
TEXT = f"{{{{ range .Alerts.Firing }}}}{EACH}{{{{ end }}}}{{{{ range .Alerts.Resolved }}}}over: {EACH}{{{{ end }}}}"
"""What is over is named with what still fires, for Alertmanager sends both."""
TITLE = "[{{ .Status }}] {{ .CommonLabels.alertname }} {{ .CommonLabels.run }}{{ .CommonLabels.service }}"


def _receiver(receivers: Receivers, monitor: str) -> dict[str, Any]:
    hooks = [monitor, *([receivers.webhook] if receivers.webhook else [])]
    found: dict[str, Any] = {"webhook_configs": [{"url": url, "send_resolved": True} for url in hooks]}
    if receivers.slack_channel:
        found["slack_configs"] = [
            {
                "api_url_file": receivers.slack_url_file,
                "channel": receivers.slack_channel,
                "send_resolved": True,
                "title": TITLE,
                "text": TEXT,
            }
        ]
    if receivers.email_to:
        account = {"auth_username": receivers.smtp_user, "auth_password_file": receivers.smtp_password_file}
        found["email_configs"] = [
            {
                "to": receivers.email_to,
                "from": receivers.email_from,
                "smarthost": receivers.smtp,
                "send_resolved": True,
                "headers": {"Subject": TITLE},
                "text": TEXT,
                "html": "",
                **(account if receivers.smtp_user else {}),
            }
        ]
    return found


def _require(condition: bool, names: str) -> None:
    if not condition:
        raise UserError(f"[monitoring] {names} go together: set all of them, or none")
