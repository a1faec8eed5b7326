"""An HTTP server that follows the champion. It needs the object store alone: no MLflow, no recipe (docs/serving.md)."""
