"""Imported by the server that readers are forked from, before it forks any. Signals to its rank's group are for the
agent to act on; readers end with their rank, and none before it has made its last checkpoint."""

import os

os.setpgid(0, 0)
