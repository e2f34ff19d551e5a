"""mupass: one call to maximal-update parameterization, for first- and second-order optimizers.

model = mupass.transform(model)
optimizer = mupass.KFAC(model, lr=0.1)
model = torch.compile(model)
"""

from mupass._analyze import analyze
from mupass._errors import (
    CaptureError,
    InferenceError,
    MupassError,
    OptimizerError,
    PlanError,
    TransformError,
)
from mupass._geometry import Analysis, Fusion, Geometry, Use
from mupass._optim import KFAC, Shampoo, param_groups
from mupass._plan import Entry, OptimizerSpec, Plan, Scales, plan_of
from mupass._report import Question, Report
from mupass._transform import transform

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "CaptureError",
    "Entry",
    "Fusion",
    "Geometry",
    "InferenceError",
    "KFAC",
    "MupassError",
    "OptimizerError",
    "OptimizerSpec",
    "Plan",
    "PlanError",
    "Question",
    "Report",
    "Scales",
    "Shampoo",
    "TransformError",
    "Use",
    "analyze",
    "param_groups",
    "plan_of",
    "transform",
]
