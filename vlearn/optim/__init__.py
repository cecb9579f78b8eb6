"""Natural-gradient variational optimizers that drop into any torch.optim loop."""

from vlearn.optim.diagnostics.diagnostics import Diagnostics
from vlearn.optim.evon import EVON
from vlearn.optim.full_von import FullVON
from vlearn.optim.ivon import IVON
from vlearn.optim.kfac_von import KFACVON
from vlearn.optim.parameters.options import SharedOptions
from vlearn.optim.vadamw import VAdamW
from vlearn.optim.vogn import VOGN
from vlearn.optim.von import VON

__all__ = ["Diagnostics", "EVON", "FullVON", "IVON", "KFACVON", "SharedOptions", "VAdamW", "VOGN", "VON"]
