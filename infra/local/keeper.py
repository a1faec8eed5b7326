"""`python -m infra.local.keeper`: has the stack up again after its supervisor was killed; that restarts this one.

If both die at the same moment, `unbroken up` is left to a person.
"""

from __future__ import annotations

import logging
import os
import select
import time
from pathlib import Path

from infra.local import stack, supervisor
from infra.local.watch import log_path
from infra.settings import home
from training.errors import InfrastructureError, UserError

log = logging.getLogger("infra.local.keeper")

PAUSE_SECONDS = 1.0
"""Whoever killed the supervisor may be about to kill all the rest: this one too, then."""
RETRY_SECONDS = 5.0


def main() -> None:
    folder = home()
    parent = os.getppid()
    maybe_supervisor = supervisor.supervisor_process(folder)
    if maybe_supervisor is not None and maybe_supervisor.pid == parent:  # else it died while this one began
        _wait_for_death(parent)
    _log_to(log_path(folder, "keeper"))  # the supervisor took along the pipe that it read
    log.warning("the supervisor is dead")
    time.sleep(PAUSE_SECONDS)
    keep_up()


def keep_up() -> None:
    """Bring the stack up, as often as it takes: what is to start last would be missing otherwise."""
    while True:
        try:
            stack.revive(log.info)
            return
        except (InfrastructureError, UserError) as error:  # a disk that is full now need not stay so
            log.warning("%s", error)
            time.sleep(RETRY_SECONDS)


def _wait_for_death(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(process, select.POLLIN)
    while os.getppid() == pid:  # not so if it died before it was opened, and another has its number
        poll.poll(60_000)
    os.close(process)


def _log_to(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")


if __name__ == "__main__":
    main()
