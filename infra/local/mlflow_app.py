"""MLflow's server behind one password: the application `unbroken` of `mlflow server --app-name` (see pyproject.toml).

MLflow's own `basic-auth` has users and rights, in a second database, and hashes a password for each request. The local
stack needs one password for all: it is compared, and nothing is kept.
"""

from __future__ import annotations

import os

from infra.passwords import PasswordRequired


def create_app() -> PasswordRequired:
    """For uvicorn. The password is what MLflow's clients on this machine have in their environment."""
    from mlflow.server.fastapi_app import app

    user = f"{os.environ['MLFLOW_TRACKING_USERNAME']}:{os.environ['MLFLOW_TRACKING_PASSWORD']}"
    return PasswordRequired(app, realm="mlflow", user=user, open_path="/health")
