import os

import torch

# Under xdist the workers already fill the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
