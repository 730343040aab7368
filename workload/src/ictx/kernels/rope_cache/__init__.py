"""`mla_rope_cache`: new tokens' rows of the latent cache."""
