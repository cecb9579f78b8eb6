"""Natural-gradient variational optimizers that drop into any torch.optim loop."""

from vlearn.optim.ivon import IVON

__all__ = ["IVON"]
