"""Fixtures that all tests share: one real local stack for the whole session, with ports and data of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import botocore.endpoint
import pytest
from hypothesis import HealthCheck, settings

from infra.local import supervisor
from infra.passwords import password_path, read_password
from infra.settings import Settings, activate, credentials_path, load_settings
from tests.faults.proxy import LosingProxy
from tests.leftovers import end_all_runs
from tests.secrets import places_of_secrets
from tests.waiting import wait_until
from training.s3 import bucket
from training.s3.objectstore import Store, StoreLocation

UNBROKEN = str(Path(sysconfig.get_path("scripts")) / "unbroken")
LONGEST = ("test_deaths.py", "test_dvc.py", "test_cancelling.py", "test_pipeline.py")
"""Files that take minutes."""
LONG, QUICK = ("flows", "faults", "slurm"), ("unit",)
"""Folders of tests, by how long a file of theirs takes."""
CANARY = os.urandom(16).hex()
"""A secret of whoever starts the stack."""
HAS_FAILED = pytest.StashKey[bool]()
NO_PARTS = ("UNBROKEN_S3_ENDPOINT", "UNBROKEN_MLFLOW_URI", "UNBROKEN_PREFECT_API_URL", "UNBROKEN_SETTINGS")


settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")  # it would fail an example that takes 0.2 s, whatever the machine was busy with


def pytest_configure() -> None:
    """What tests start can be interrupted, even if they were started in a shell's background, where it ignores that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever is free takes the next file: at the end nobody shall wait for one that takes minutes.

    Within a folder the order stays random.
    """

    def place(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.parent.name
        return item.path.name not in LONGEST, (folder in QUICK) - (folder in LONG)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[HAS_FAILED] = item.stash.get(HAS_FAILED, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def _no_run_outlives_a_failure(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.node.stash.get(HAS_FAILED, False) and "stack" in request.fixturenames:
        stack = request.getfixturevalue("stack")
        end_all_runs(stack.home, stack.settings.prefect_api_url)
        for command in stack.started:
            command.kill()
            command.wait()


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A running local stack, and how to use it from a test."""

    home: Path
    settings: Settings
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    """All commands that tests did not wait for at once."""

    @property
    def location(self) -> StoreLocation:
        return StoreLocation(endpoint=self.settings.s3_endpoint, bucket=self.settings.s3_bucket)

    @property
    def store(self) -> Store:
        return Store(self.location)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "UNBROKEN_HOME": str(self.home)}

    def command(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run the `unbroken` command to its end."""
        return self.execute([UNBROKEN, *arguments], cwd=cwd)

    def execute(self, command: Sequence[str], *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=self.environment(), capture_output=True, text=True, timeout=400, check=False
        )

    def start(self, *arguments: str, cwd: Path | None = None, s3_endpoint: str = "") -> subprocess.Popen[str]:
        """Start the `unbroken` command and go on; before another S3 endpoint than the stack's own, if one is given."""
        endpoint = {"UNBROKEN_S3_ENDPOINT": s3_endpoint} if s3_endpoint else {}
        command = subprocess.Popen(
            [UNBROKEN, *arguments],
            cwd=cwd,
            env=self.environment() | endpoint,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(command)
        return command


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack") / "home") as running:
        yield running


@contextlib.contextmanager
def running_stack(home: Path) -> Iterator[Stack]:
    """S3, MLflow, Prefect, a worker and the local engine, for real; stopped, and no process left, at the end."""
    before = dict(os.environ)
    for name in NO_PARTS:
        os.environ.pop(name, None)
    os.environ |= {"UNBROKEN_HOME": str(home), "SOME_API_KEY": CANARY}
    _take_down_if_we_die(home)
    started = subprocess.run([UNBROKEN, "up"], capture_output=True, text=True, timeout=240, check=False)
    assert started.returncode == 0, started.stdout + started.stderr
    settings = load_settings()
    activate(settings)
    running = Stack(home=home, settings=settings)
    yield running
    left = _secrets_left(running)
    os.environ.clear()
    os.environ.update(before)
    subprocess.run([UNBROKEN, "down"], check=True, timeout=240, env={**os.environ, "UNBROKEN_HOME": str(home)})
    wait_until(lambda: not supervisor.stack_processes(home), what="every process of the stack to be gone")
    assert not left, f"secrets lie in {left}"


def _take_down_if_we_die(home: Path) -> None:
    """A stack outlives whoever started it, and tests may be killed. Whoever sees to that is no child of theirs."""
    script = f'(tail --pid={os.getpid()} -f /dev/null; [ -d "{home}" ] && "{UNBROKEN}" down) > /dev/null 2>&1 &'
    environment = {**os.environ, "UNBROKEN_HOME": str(home)}
    subprocess.run(["sh", "-c", script], env=environment, start_new_session=True, stdin=subprocess.DEVNULL, check=True)


def _secrets_left(stack: Stack) -> list[str]:
    """Where the keys of the store, or a word of this environment that nobody needs, came to lie."""
    keys = credentials_path(stack.home)
    secret = keys.read_text().rpartition("aws_secret_access_key = ")[2].strip()
    pids = [process.pid for process in supervisor.stack_processes(stack.home)]
    parts = stack.settings.passwords
    allowed = (keys, stack.home / "s3-identities.json", *(password_path(stack.home, part) for part in parts))
    known = (secret, CANARY, *(read_password(stack.home, part) for part in parts))
    return places_of_secrets(stack.home, stack.store, known, allowed=allowed, processes=pids)


@pytest.fixture
def store(stack: Stack, request: pytest.FixtureRequest) -> Store:
    """An empty corner of the stack's real object store, for one test."""
    name = f"tests/{request.node.name}-{os.urandom(4).hex()}/"
    where = stack.location
    return Store(StoreLocation(endpoint=where.endpoint, bucket=where.bucket, prefix=name))


@pytest.fixture(scope="session")
def python() -> str:
    return sys.executable


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, and those of the client."""
    monkeypatch.setattr(bucket, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(botocore.endpoint, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def proxy(store: Store) -> Iterator[LosingProxy]:
    assert store.location.endpoint is not None
    with LosingProxy(store.location.endpoint) as running:
        yield running


@pytest.fixture
def behind_proxy(store: Store, proxy: LosingProxy) -> Store:
    return Store(replace(store.location, endpoint=proxy.endpoint))
