"""`python -m flows.reaper`: look, judge, act, for ever. The local stack supervises one; beside a worker, start another.

It keeps nothing, so it may be killed at any time; two do no harm to one another.
"""

from __future__ import annotations

import logging
import threading
import time

from flows.reaper.attempt import attempt
from tasks.stack import open_stack

log = logging.getLogger("flows.reaper")

LOOK_SECONDS = 2.0


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    settings, store = open_stack()  # before Prefect is imported, which reads its settings then
    from prefect.client.orchestration import get_client

    from flows.reaper.champions import watch_champions
    from flows.reaper.engine_jobs import end_unwanted
    from flows.reaper.flow_runs import FlowRuns
    from flows.reaper.sources import watch_sources
    from flows.reaper.tracked_runs import watch_tracked_runs
    from infra.engines import make_launcher

    launcher = make_launcher(settings)
    beside = [
        threading.Thread(name="sources", target=watch_sources, daemon=True),
        threading.Thread(name="runs in MLflow", target=watch_tracked_runs, args=(settings, store), daemon=True),
        threading.Thread(name="champions", target=watch_champions, args=(settings, store), daemon=True),
    ]
    for watching in beside:
        watching.start()
    with get_client(sync_client=True) as client:
        flow_runs = FlowRuns(client, launcher)
        while True:
            attempt("Prefect", lambda: flow_runs.set_right(now=time.monotonic()))
            attempt("the engine", lambda: end_unwanted(launcher, flow_runs))
            for watching in beside:
                if not watching.is_alive():  # a bug; a new process begins anew
                    raise RuntimeError(f"the thread that watches the {watching.name} has died: see above")
            time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
