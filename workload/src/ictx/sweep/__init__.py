"""Sweeps: many short runs of one stage, whose settings Optuna chooses; any number of workers on any nodes."""
