"""Measuring sub-networks: evaluation, sweeps, the frontier, the report."""

from elastic_moe.lab.sweeps.sweep import sweep

__all__ = ["sweep"]
