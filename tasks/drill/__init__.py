"""The drill: short trainings of a preset, a fault in each, compared bit by bit with one that nothing happened to."""
