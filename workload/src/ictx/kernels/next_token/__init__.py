"""The ends of a decode step: embedding, rotation and slot; the likeliest logit."""
