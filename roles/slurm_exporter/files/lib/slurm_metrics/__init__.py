"""Metrics of SLURM and its training jobs, from programs and files whose content users control."""
