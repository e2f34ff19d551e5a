"""mupass: one call to maximal-update parameterization, for first- and second-order optimizers.

model = mupass.transform(model)
optimizer = mupass.KFAC(model, lr=0.1)
model = torch.compile(model)
"""

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
    TransformError,
)
from mupass._hyper.hypergradient import GroupGradient, HyperGradient, hypergradient
from mupass._initialize import initialize
from mupass._optim import KFAC, SOAP, FoMoH, LevenbergMarquardt, Muon, Shampoo, param_groups, sample_targets
from mupass._report import Question, Report
from mupass._resize.resize import resize
from mupass._roles.geometry import Analysis, Fusion, Geometry, Use
from mupass._scales.plan import Entry, OptimizerSpec, Plan, Scales, plan_of
from mupass._study.batches import StudyError
from mupass._study.check import coord_check
from mupass._study.coords import CoordCheck
from mupass._study.report import report
from mupass._study.sweep import sweep
from mupass._study.transfer import Transfer, transfer
from mupass._study.trials import Optimum, Sweep, Trial
from mupass._transform import transform

__version__ = "0.1.0"
__all__ = [
    "Alignment",
    "AlignmentProbe",
    "Analysis",
    "CaptureError",
    "CoordCheck",
    "Entry",
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
    "hypergradient",
    "initialize",
    "measured_exponents",
    "param_groups",
    "plan_of",
    "report",
    "resize",
    "sample_targets",
    "sweep",
    "transfer",
    "transform",
]
