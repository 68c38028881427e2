"""The rules of medmom.optim as the tests make them."""

from __future__ import annotations

from typing import Any

from medmom import optim
from medmom.optim.engine import MomentumOptimizer

RULES = optim.__all__
STEPS = 800
# What a rule must be told, and what brings it to the small targets within so many steps.
OPTIONS: dict[str, dict[str, Any]] = {
    "AdaMomentum": {"lr": 0.01},
    "EqualBetaAdam": {"lr": 0.05},
    "FSGDM": {"lr": 0.01, "total_steps": STEPS},
    "Lion": {"lr": 0.02},
    "LowRankAdam": {"lr": 0.05},
    "MoMoAdam": {"lr": 0.1},
    "QHAdam": {"lr": 0.05, "betas": (0.9, 0.999)},
    "QHM": {"lr": 0.03, "momentum": 0.9},
    "ScheduleFreeAdamW": {"lr": 0.05},
    "ScheduleFreeSGD": {"lr": 0.05},
    "SignSGD": {"lr": 0.02},
    "Signum": {"lr": 0.02},
}


def build(name: str, params: Any, **options: Any) -> MomentumOptimizer:
    """A rule by its name, ready for the small targets."""
    rule: MomentumOptimizer = getattr(optim, name)(params, **{**OPTIONS.get(name, {}), **options})
    return rule


def to_the_weights_that_count(optimizer: Any) -> None:
    """Puts a rule that trains at another point where it is to be judged."""
    getattr(optimizer, "eval", lambda: None)()
