"""Roles of parameters, update rules, the optimizer that drives them, and the rate schedule."""

from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.roles import assign_roles
from nativerank.optim.schedule import multiplier

__all__ = ["LowRankOptimizer", "assign_roles", "multiplier"]
