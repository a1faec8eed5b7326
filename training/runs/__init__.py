"""What is kept of a run: its record, its events, and what they tell."""
