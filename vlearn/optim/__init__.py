"""Natural-gradient variational optimizers that drop into any torch.optim loop."""

from vlearn.optim.ivon import IVON
from vlearn.optim.vogn import VOGN

__all__ = ["IVON", "VOGN"]
