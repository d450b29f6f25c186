"""What all tests share: one thread, and hypothesis without clocks or chance."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("convsurgeon", deadline=None, derandomize=True)
settings.load_profile("convsurgeon")
