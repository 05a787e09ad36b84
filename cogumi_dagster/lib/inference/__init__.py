"""Inference through one interface: what evaluates a model is what serves it."""

from cogumi_dagster.lib.inference.base import Chunk, Completion, Engine, Message

__all__ = ["Chunk", "Completion", "Engine", "Message"]
