"""Metrics of SLURM and of its training jobs, from programs and files that users have a hand in."""
