"""Checks whether a machine or a job's environment has what training and serving need."""
