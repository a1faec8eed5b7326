"""The Slurm engine: a job is an array of single-node jobs, each an agent. Slurm owns nodes, priority and preemption."""
