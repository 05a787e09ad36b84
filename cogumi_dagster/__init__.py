"""Cogumi: turn large teachers into small, compressed, routed models, as one Dagster graph."""

__version__ = "0.1.0"
