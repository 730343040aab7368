"""The matrix-vector products of a decode step."""
