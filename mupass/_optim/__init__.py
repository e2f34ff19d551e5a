"""Optimizers that read their width factors from the plan."""

from mupass._optim._groups import param_groups
from mupass._optim._kfac import KFAC
from mupass._optim._muon import Muon
from mupass._optim._shampoo import Shampoo
from mupass._optim._soap import SOAP

__all__ = ["KFAC", "SOAP", "Muon", "Shampoo", "param_groups"]
