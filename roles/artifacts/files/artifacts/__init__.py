"""External artifacts: list, download into a mirror, verify, and bundle for an air-gapped network."""
