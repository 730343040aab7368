"""Multi-head Latent Attention's operations: Triton kernels, and a PyTorch version of each that says what is right."""
