"""Optimizers that read their width factors from the plan."""

from mupass._optim._adaptive import LevenbergMarquardt
from mupass._optim._fomoh import FoMoH
from mupass._optim._groups import param_groups
from mupass._optim._kfac import KFAC
from mupass._optim._muon import Muon
from mupass._optim._sampling import sample_targets
from mupass._optim._shampoo import Shampoo
from mupass._optim._soap import SOAP

__all__ = ["KFAC", "SOAP", "FoMoH", "LevenbergMarquardt", "Muon", "Shampoo", "param_groups", "sample_targets"]
