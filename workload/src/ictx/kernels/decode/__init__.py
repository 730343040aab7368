"""`mla_decode`: absorbed attention over the latent cache."""
