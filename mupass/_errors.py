"""Every error that mupass raises on purpose, and the category of its warnings."""


class MupassError(Exception):
    """Base class of all mupass errors; catching it catches every refusal by this package."""


class CaptureError(MupassError):
    """The model could not be captured as a graph (bad example inputs, no parameters)."""


class InferenceError(MupassError):
    """Width inference met something it must not guess (unknown operator, nothing infinite)."""


class PlanError(MupassError, ValueError):
    """A plan is invalid, unreadable, or belongs to another model."""


class TransformError(MupassError):
    """The model cannot be rewritten (transformed twice, no module to hold a multiplier)."""


class ResizeError(MupassError):
    """The model cannot be built at the width asked for; the message names the dimensions."""


class OptimizerError(MupassError, ValueError):
    """An optimizer was given an argument it cannot use."""


class MupassWarning(UserWarning):
    """Something changes a result or asks for an answer: which parameter or operator, why, what to write."""
