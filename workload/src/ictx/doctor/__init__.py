"""What a machine, or a job's environment, has and lacks for training and serving."""
