"""Who is champion: the history on the store, promotion and rollback, and the alias in MLflow as their projection."""
