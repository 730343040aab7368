"""`mla_rope_cache`: writes new tokens' rows of the latent cache."""
