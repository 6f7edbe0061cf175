"""Settings that every test shares."""

import matplotlib
import torch
from hypothesis import settings

matplotlib.use("Agg")
torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")
