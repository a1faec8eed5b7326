"""The library that runs on every rank. It knows no orchestrator and no tracker."""
