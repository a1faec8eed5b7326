"""A registered model's predictions for every sample of a dataset version (docs/lifecycle.md, "Batch prediction")."""
