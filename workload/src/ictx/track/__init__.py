"""Where a run's records go: metrics.jsonl in its folder, and from there to every tracking server."""
