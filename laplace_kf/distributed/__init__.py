"""Fits over several processes of ``torch.distributed``: who does what, and what they tell each other."""

from laplace_kf.distributed.assignment import assigned
from laplace_kf.distributed.first import First
from laplace_kf.distributed.opening import refuse_checkpoint, require_one_job, require_one_network
from laplace_kf.distributed.ranks import Ranks
from laplace_kf.distributed.shared_work import decomposed, done, refined
from laplace_kf.distributed.sums import Seen, added_up, merged

__all__ = [
    "First",
    "Ranks",
    "Seen",
    "added_up",
    "assigned",
    "decomposed",
    "done",
    "merged",
    "refined",
    "refuse_checkpoint",
    "require_one_job",
    "require_one_network",
]
