"""Metrics of training runs for monitoring: about.json, and model FLOPS utilisation."""

from ictx.metrics.about import write_about
from ictx.metrics.efficiency import Flops, flops_per_token, model_flops_utilisation, peak_flops

__all__ = ["Flops", "flops_per_token", "model_flops_utilisation", "peak_flops", "write_about"]
