"""`serve`: a model over HTTP, which follows the champion (docs/serving.md)."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

from cyclopts import App, Parameter

from flows.cli.stack import Json, open_store


def add_to(app: App) -> None:
    app.command(serve)


def serve(
    model: Annotated[str, Parameter(help="NAME@champion, whoever that is; or NAME/VERSION.")],
    /,
    *,
    host: Annotated[str, Parameter(help="The address to listen on. Whoever reaches it may ask.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="0 takes any free one.")] = 0,
    replicas: Annotated[int, Parameter(help="Processes that compute, each with one thread.")] = 2,
    poll_seconds: Annotated[float, Parameter(help="How often to look who is champion.")] = 1.0,
    json: Json = False,
) -> None:
    """Serve a model over HTTP until Ctrl-C, and follow its champion without a failed request."""
    store = open_store()
    from tasks.serving.server import serve as serve_model

    def tell(served: dict[str, Any]) -> None:
        if json:
            print(json_module.dumps(served), flush=True)
        else:
            print(f"{served['model']} version {served['version']} at {served['url']}/invocations", flush=True)

    serve_model(store, model, host=host, port=port, num_replicas=replicas, poll_seconds=poll_seconds, tell=tell)
