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
from mupass._geometry import Analysis, Geometry, Use

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "CaptureError",
    "Geometry",
    "InferenceError",
    "MupassError",
    "OptimizerError",
    "PlanError",
    "TransformError",
    "Use",
    "analyze",
]
