"""The state in memory that goes from one group of ranks to the next."""
