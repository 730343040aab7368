"""Operations of Multi-head Latent Attention: Triton kernels, each with a PyTorch reference."""
