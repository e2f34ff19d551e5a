"""Names for what the parts of an optimizer hand to each other."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]  # by name of a parameter
MatrixTensors = dict[tuple[str, int], Tensor]  # by name of a parameter, and number of the matrix in it
State = dict[str, Tensor]  # by name of an entry: of a parameter's state, or of a stack's
Group = Mapping[str, Any]  # a parameter group of an optimizer: its members and their settings
