"""`mla_attention`: causal attention within packed documents, with its gradient."""
