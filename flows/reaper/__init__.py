"""The reaper: Prefect, MLflow and the engine tell the truth, although whoever should have told it is dead."""
