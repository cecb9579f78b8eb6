"""Natural-gradient variational optimizers that drop into any torch.optim loop."""

from vlearn.optim.full import FullVON
from vlearn.optim.ivon import IVON
from vlearn.optim.kfac import KFACVON
from vlearn.optim.vogn import VOGN
from vlearn.optim.von import VON

__all__ = ["FullVON", "IVON", "KFACVON", "VOGN", "VON"]
