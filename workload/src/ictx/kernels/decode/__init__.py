"""`mla_decode`: attention to the latent cache."""
