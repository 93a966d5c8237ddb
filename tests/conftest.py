"""One thread for every test: bits change with the number of threads."""

import torch

torch.set_num_threads(1)
