"""Adapters to tools outside; each imports its tool only when it is used."""

from vlearn.integrations import wandb

__all__ = ["wandb"]
