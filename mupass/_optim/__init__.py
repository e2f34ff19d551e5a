"""Optimizers that read their width factors from the plan."""

from mupass._optim.adaptive import LevenbergMarquardt
from mupass._optim.fallback import Fallback
from mupass._optim.fomoh import FoMoH
from mupass._optim.groups import param_groups
from mupass._optim.kfac import KFAC
from mupass._optim.muon import Muon
from mupass._optim.sampling import sample_targets
from mupass._optim.shampoo import Shampoo
from mupass._optim.soap import SOAP

__all__ = [
    "KFAC",
    "SOAP",
    "Fallback",
    "FoMoH",
    "LevenbergMarquardt",
    "Muon",
    "Shampoo",
    "param_groups",
    "sample_targets",
]
