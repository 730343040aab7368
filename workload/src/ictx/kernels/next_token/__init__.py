"""The first and last operations of a decode step: embedding, rotation and slot; the largest logit."""
