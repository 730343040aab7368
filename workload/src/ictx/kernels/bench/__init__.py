"""`ictx kernels bench`: our kernels beside what else computes the same."""
