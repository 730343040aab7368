"""`ictx kernels bench`: benchmarks of our kernels and of other libraries."""
