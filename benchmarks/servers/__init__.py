"""Parameter servers: how soon they go on after a kill, and what a message costs."""
