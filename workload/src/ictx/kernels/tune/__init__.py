"""`ictx kernels tune`: the search for the fastest configurations on a GPU."""
