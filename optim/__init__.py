"""Momentum optimizers: torch alone. Schedules stand in ``medmom.optim.schedules``."""

from medmom.optim.heavy_ball import HeavyBall
from medmom.optim.momo import MoMo

__all__ = ["HeavyBall", "MoMo"]
