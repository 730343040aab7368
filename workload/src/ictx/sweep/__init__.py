"""Sweeps: short runs of one stage with settings selected by Optuna; any number of workers on any nodes."""
