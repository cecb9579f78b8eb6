"""Adapters to tools outside; each imports its tool only when it is used."""

from vlearn.integrations import lightning, transformers, wandb

__all__ = ["lightning", "transformers", "wandb"]
