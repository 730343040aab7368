"""Benchmarks of whole models (those of single kernels are `ictx kernels bench`)."""
