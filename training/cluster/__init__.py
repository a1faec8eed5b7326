"""Who trains together: the protocol without input or output, agents, and the processes of ranks."""
