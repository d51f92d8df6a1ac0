"""Functions that the pictures share: which layers are drawn, numbers as arrays, and names as labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Final, TypeAlias, TypeVar, cast

import numpy as np
from torch import Tensor

from actrec._recordings.layer import Layer
from actrec._recordings.recording import Recording
from actrec._text import shown
from actrec._values.chunks import dense
from actrec.errors import OptionError

F = TypeVar("F", bound=Callable[..., Any])

#: A recording, or some layers of one: ``{name: acts[name] for name in chosen}``.
Layers: TypeAlias = Mapping[str, Layer[Any]]
Array: TypeAlias = np.ndarray[Any, Any]

LONGEST_NAME: Final = 40
#: Up to so many layers or points are drawn with space between them.
FEW: Final = 30


def of_layers(draw: F) -> F:
    """Return a function that draws layers, with a check of what it is given: one argument, a recording."""
    call = draw.__name__

    @wraps(draw)
    def checked(acts: Layers, *more: object, **options: Any) -> Any:
        given: object = acts
        if more:
            message = (
                f"{call}(): expected only a recording. Write {call}(acts.select({more[0]!r}))."
            )
            raise OptionError(message)
        if not isinstance(given, Mapping):
            message = (
                f"{call}(): expected a recording, or some layers of one in a dict such as {{name: acts[name]}}, got "
                f"{type(given).__name__}."
            )
            if isinstance(given, Layer):
                message += f" Write {call}(acts.select({given.name!r}))."
            raise OptionError(message)
        return draw(acts, **options)

    return cast("F", checked)


def ordered(acts: Layers) -> list[str]:
    """Return the names of the layers that were called, in execution order if it is known."""
    if isinstance(acts, Recording):
        return acts.execution_order
    return [name for name, layer in acts.items() if len(layer)]


def at_least_one(call: str, most: int) -> None:
    """Raise ``OptionError`` unless ``most`` is a whole number above 0."""
    if not hasattr(most, "__index__") or most < 1:
        message = f"{call}(most={most!r}): expected a whole number, 1 or more."
        raise OptionError(message)


def short(name: str) -> str:
    """Return a name as a label: a long one without its middle, with matplotlib's special characters escaped."""
    name = shown(name)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2 - 2]}...{name[-LONGEST_NAME // 2 + 1 :]}"
    return name.replace("$", r"\$")


def numbers(tensor: Tensor) -> Array:
    """Return the elements as float64; the moduli of complex ones."""
    (plain,) = dense(tensor)
    plain = plain.abs() if plain.is_complex() else plain
    array: Array = plain.cpu().double().numpy()
    return array
