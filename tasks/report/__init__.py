"""The report of a run, or of several side by side: one page without scripts (docs/report.md).

gather.py → facts.py, what the store has of it → figures.py, compare.py, on canvas.py → page.py, templates/. attach.py
hands it to MLflow.
"""
