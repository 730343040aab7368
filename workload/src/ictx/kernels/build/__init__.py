"""Ahead-of-time compilation of kernels: recording launches, checking compiled code, reading the shipped folder."""
