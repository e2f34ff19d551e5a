"""mupass: one call to maximal-update parameterization, for first- and second-order optimizers.

model = mupass.transform(model)
optimizer = mupass.KFAC(model)
model = torch.compile(model)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mupass._alignment import Alignment, AlignmentProbe, alignment, measured_exponents
    from mupass._analyze import analyze
    from mupass._errors import (
        CaptureError,
        InferenceError,
        MupassError,
        MupassWarning,
        OptimizerError,
        PlanError,
        ResizeError,
        StudyError,
        TransformError,
    )
    from mupass._fold import fold
    from mupass._hyper.fomoh import FoMoH
    from mupass._hyper.hypergradient import GroupGradient, HyperGradient, hypergradient
    from mupass._initialize import initialize
    from mupass._optim.adaptive import LevenbergMarquardt
    from mupass._optim.fallback import Fallback
    from mupass._optim.groups import param_groups
    from mupass._optim.kfac import KFAC
    from mupass._optim.muon import Muon
    from mupass._optim.sampling import sample_targets
    from mupass._optim.shampoo import Shampoo
    from mupass._optim.soap import SOAP
    from mupass._records import Fusion, Geometry, Use
    from mupass._report import Analysis, Question, Report
    from mupass._resize.resize import resize
    from mupass._scales.plan import Entry, OptimizerSpec, Plan, Scales, plan_of
    from mupass._stage import stage
    from mupass._study.check import coord_check
    from mupass._study.coords import CoordCheck
    from mupass._study.report import report
    from mupass._study.sweep import sweep
    from mupass._study.sweep_result import Sweep
    from mupass._study.transfer import Transfer, transfer
    from mupass._study.trials import Optimum, Trial
    from mupass._transform import transform

__version__ = "0.1.0"
__all__ = [
    "Alignment",
    "AlignmentProbe",
    "Analysis",
    "CaptureError",
    "CoordCheck",
    "Entry",
    "Fallback",
    "FoMoH",
    "Fusion",
    "Geometry",
    "GroupGradient",
    "HyperGradient",
    "InferenceError",
    "KFAC",
    "LevenbergMarquardt",
    "Muon",
    "MupassError",
    "MupassWarning",
    "Optimum",
    "OptimizerError",
    "OptimizerSpec",
    "Plan",
    "PlanError",
    "Question",
    "Report",
    "ResizeError",
    "SOAP",
    "Scales",
    "Shampoo",
    "StudyError",
    "Sweep",
    "Transfer",
    "TransformError",
    "Trial",
    "Use",
    "alignment",
    "analyze",
    "coord_check",
    "fold",
    "hypergradient",
    "initialize",
    "measured_exponents",
    "param_groups",
    "plan_of",
    "report",
    "resize",
    "sample_targets",
    "stage",
    "sweep",
    "transfer",
    "transform",
]

# Public name -> module, read when the name is first used: importing mupass alone costs nothing.
_MODULES = {
    "Alignment": "mupass._alignment",
    "AlignmentProbe": "mupass._alignment",
    "Analysis": "mupass._report",
    "CaptureError": "mupass._errors",
    "CoordCheck": "mupass._study.coords",
    "Entry": "mupass._scales.plan",
    "Fallback": "mupass._optim.fallback",
    "FoMoH": "mupass._hyper.fomoh",
    "Fusion": "mupass._records",
    "Geometry": "mupass._records",
    "GroupGradient": "mupass._hyper.hypergradient",
    "HyperGradient": "mupass._hyper.hypergradient",
    "InferenceError": "mupass._errors",
    "KFAC": "mupass._optim.kfac",
    "LevenbergMarquardt": "mupass._optim.adaptive",
    "Muon": "mupass._optim.muon",
    "MupassError": "mupass._errors",
    "MupassWarning": "mupass._errors",
    "OptimizerError": "mupass._errors",
    "OptimizerSpec": "mupass._scales.plan",
    "Optimum": "mupass._study.trials",
    "Plan": "mupass._scales.plan",
    "PlanError": "mupass._errors",
    "Question": "mupass._report",
    "Report": "mupass._report",
    "ResizeError": "mupass._errors",
    "SOAP": "mupass._optim.soap",
    "Scales": "mupass._scales.plan",
    "Shampoo": "mupass._optim.shampoo",
    "StudyError": "mupass._errors",
    "Sweep": "mupass._study.sweep_result",
    "Transfer": "mupass._study.transfer",
    "TransformError": "mupass._errors",
    "Trial": "mupass._study.trials",
    "Use": "mupass._records",
    "alignment": "mupass._alignment",
    "analyze": "mupass._analyze",
    "coord_check": "mupass._study.check",
    "fold": "mupass._fold",
    "hypergradient": "mupass._hyper.hypergradient",
    "initialize": "mupass._initialize",
    "measured_exponents": "mupass._alignment",
    "param_groups": "mupass._optim.groups",
    "plan_of": "mupass._scales.plan",
    "report": "mupass._study.report",
    "resize": "mupass._resize.resize",
    "sample_targets": "mupass._optim.sampling",
    "stage": "mupass._stage",
    "sweep": "mupass._study.sweep",
    "transfer": "mupass._study.transfer",
    "transform": "mupass._transform",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return found
    raise AttributeError(f"module 'mupass' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
