"""Runs `mlflow gc` with the database's URI from the environment: every user of the node can read arguments."""

import os
import sys

from mlflow.cli import cli

cli(["gc", "--backend-store-uri", os.environ["MLFLOW_BACKEND_STORE_URI"], "--older-than", sys.argv[1]])
