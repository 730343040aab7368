"""The products of a decode step."""
