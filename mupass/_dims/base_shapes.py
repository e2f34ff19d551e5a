"""Files of base shapes, as microsoft/mup writes them: which axes are widths, and their base sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupass._dims.infer import Inference
from mupass._dims.second_instance import Second
from mupass._errors import InferenceError

# Such a file may be edited by hand: sizes out of this range are mistakes.
SIZES = (1, 10**9)


@dataclass(frozen=True)
class BaseShapes:
    """What a file says of every parameter.

    Attributes:
        path: The file.
        shapes: Parameter -> for every axis its base size, or None where it is no width.
    """

    path: str
    shapes: Mapping[str, tuple[int | None, ...]]

    @staticmethod
    def read(path: str | Path) -> BaseShapes:
        """Read a file that ``mup.make_base_shapes(..., savefile=)`` or ``mup.save_base_shapes`` wrote.

        Args:
            path: The file, YAML: a list of base sizes for each parameter, null for an axis that is no width.

        Raises:
            InferenceError: It cannot be read, or holds something else.
        """
        try:
            import yaml
        except ImportError as error:
            raise InferenceError(f"to read {path}: pip install pyyaml") from error
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InferenceError(
                f"cannot read base shapes from {str(path)!r} ({error}); base= takes a positive number, "
                "sizes by dimension name, a model, or the path of such a file"
            ) from error
        if not isinstance(content, dict) or not content:
            raise InferenceError(f"{str(path)!r} is no file of base shapes: it maps no parameter to sizes")
        return BaseShapes(
            str(path), {_name(path, name): _sizes(path, name, sizes) for name, sizes in content.items()}
        )

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a parameter at the base width.

        Args:
            name: Its name.
            shape: Its present shape.
        """
        base_shape = []
        for size, base in zip(shape, self.shapes[name], strict=True):
            base_shape.append(size if base is None else base)
        return tuple(base_shape)

    def settle(self, alone: Inference, shapes: Mapping[str, tuple[int, ...]]) -> Second:
        """Return what the file settles: the verdict on every axis, and its base size.

        Args:
            alone: Inference from the model alone.
            shapes: Shapes of its parameters.

        Raises:
            InferenceError: The file is of another architecture.
        """
        self._check(shapes)
        axes: dict[tuple[str, int], tuple[bool, str]] = {}
        dims: dict[int, tuple[bool, str]] = {}
        sizes: dict[int, int] = {}
        for name, shape in shapes.items():
            for axis, (size, base_size) in enumerate(zip(shape, self.shapes[name], strict=True)):
                found = "no base size" if base_size is None else f"the base size {base_size}"
                reason = f"{self.path} has {found} for it"
                axes[name, axis] = (base_size is not None, reason)
                # What the file says of an axis holds for all of its dimension.
                dim = alone.engine.space.find(alone.dims[name][axis])
                dims[dim] = axes[name, axis]
                sizes[dim] = size if base_size is None else base_size
        return Second(axes, dims, sizes)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a file whose parameters, or numbers of axes, are not those of the model."""
        differing = sorted(self.shapes.keys() ^ shapes.keys())
        if not differing:
            differing = [name for name, shape in shapes.items() if len(shape) != len(self.shapes[name])]
        if differing:
            raise InferenceError(f"{self.path} is of another architecture: it differs at {differing[:3]}")


def _name(path: Any, name: Any) -> str:
    if not isinstance(name, str):
        raise InferenceError(f"{str(path)!r} is no file of base shapes: {name!r} is no parameter's name")
    return name


def _sizes(path: Any, name: Any, sizes: Any) -> tuple[int | None, ...]:
    """Return the base sizes of one parameter, each checked."""
    if not isinstance(sizes, list):
        raise InferenceError(f"{str(path)!r}: {name} must have a list of sizes, not {sizes!r}")
    low, high = SIZES
    for size in sizes:
        number = isinstance(size, int) and not isinstance(size, bool)
        if size is not None and not (number and low <= size <= high):
            raise InferenceError(
                f"{str(path)!r}: a base size of {name} must be a positive integer, not {size!r}"
            )
    return tuple(sizes)
