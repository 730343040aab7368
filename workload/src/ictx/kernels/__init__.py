"""Multi-head Latent Attention's operations: Triton kernels, and a PyTorch reference of each."""
