"""A network for the command line of the tests."""

from __future__ import annotations

import torch
from torch import nn


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def nothing() -> int:
    return 1
