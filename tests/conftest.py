"""Settings shared by every test."""

from __future__ import annotations

import torch

# The nets of the tests are tiny: threads cost more than they bring, and one thread makes sums reproducible.
torch.set_num_threads(1)
