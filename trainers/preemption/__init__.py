"""Being stopped: signals, the places at which a run may be left, and asking Slurm to start it again."""
