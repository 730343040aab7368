"""`mla_attention`: causal attention among the tokens of packed documents, with its gradient."""
