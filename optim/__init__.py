"""Momentum optimizers: torch alone.

Schedules stand in ``medmom.optim.schedules``, parameter groups in ``medmom.optim.groups``, and what is known of
momentum, in numbers, in ``medmom.optim.theory``.
"""

from medmom.optim.ada_momentum import AdaMomentum
from medmom.optim.equal_betas import EqualBetaAdam
from medmom.optim.fsgdm import FSGDM
from medmom.optim.heavy_ball import HeavyBall
from medmom.optim.lion import Lion
from medmom.optim.low_rank_adam import LowRankAdam
from medmom.optim.low_rank_heavy_ball import LowRankHeavyBall
from medmom.optim.momo import MoMo
from medmom.optim.momo_adam import MoMoAdam
from medmom.optim.quasi_hyperbolic import QHM, QHAdam
from medmom.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from medmom.optim.schedule_free_polyak import ScheduleFreePolyak
from medmom.optim.signs import SignSGD, Signum

__all__ = [
    "FSGDM",
    "QHM",
    "AdaMomentum",
    "EqualBetaAdam",
    "HeavyBall",
    "Lion",
    "LowRankAdam",
    "LowRankHeavyBall",
    "MoMo",
    "MoMoAdam",
    "QHAdam",
    "ScheduleFreeAdamW",
    "ScheduleFreePolyak",
    "ScheduleFreeSGD",
    "SignSGD",
    "Signum",
]
