"""Evaluations of a model: perplexity, needles, RULER, lm-evaluation-harness, a judge; their results and report."""
