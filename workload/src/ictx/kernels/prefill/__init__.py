"""`mla_prefill`: many new tokens attend to the latent cache."""
