"""Training framework: configurations, grid searches, a trainer that survives preemption, and Slurm jobs."""
