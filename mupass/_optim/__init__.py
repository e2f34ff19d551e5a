"""Optimizers that read their width factors from the plan."""

from mupass._optim._groups import param_groups
from mupass._optim._kfac import KFAC
from mupass._optim._shampoo import Shampoo

__all__ = ["KFAC", "Shampoo", "param_groups"]
