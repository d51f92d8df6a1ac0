"""Random numbers for the user's code that runs inside the recorder, from actrec's own generators.

PyTorch's global generators are shared by all threads: restoring their state after a transform would undo what
other threads have drawn meanwhile, and give every call the same numbers. So the draws themselves are
redirected. While :class:`OwnDraws` is entered, a function that would draw from a global generator draws from one
that actrec keeps for the device. That one continues from call to call and from block to block, and its seed is
derived from ``torch.initial_seed()``: the numbers are reproducible, and never those that the model draws.

This is a ``TorchFunctionMode``, like ``torch.set_default_device``: it applies to one thread, costs a fraction of a
microsecond to enter, and next to nothing for a function that draws nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from actrec._torch import PRIVATE_DRAWS
from actrec._values.snapshot import PLAIN

#: The functions that may draw from the global generators. Depending on the version of PyTorch, some take a ``generator``.
_DRAWING: Final = PRIVATE_DRAWS | {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "binomial",
    "rrelu", "rrelu_", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_",
    "random_", "uniform_", "rand_like", "randn_like", "randint_like", "kaiming_uniform_", "kaiming_normal_",
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_",
    "feature_dropout", "feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_", "native_dropout",
    "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "gumbel_softmax",
    "multi_head_attention_forward", "fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices",
}  # fmt: skip


class OwnDraws(TorchFunctionMode):
    """While this is entered, this thread draws from actrec's own generators."""

    def __init__(self) -> None:  # without super(), which does nothing but takes a fifth of the time
        self._seed = torch.default_generator.initial_seed()

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # The user seeded the global generator inside fork_rng(), to draw from it.
        if name not in _DRAWING or self.was_seeded() or _has_generator(args, kwargs):
            return func(*args, **kwargs)
        if PLAIN.issuperset(types):
            own = _own(_device(args, kwargs))
            try:
                return func(*args, **{**kwargs, "generator": own})
            except TypeError:  # it takes no generator, in this version or with these arguments
                pass
        with _instead_of_global(args, kwargs):
            return func(*args, **kwargs)

    def was_seeded(self) -> bool:
        """Whether PyTorch's global generator was seeded since this was made."""
        return torch.default_generator.initial_seed() != self._seed

    def check_unseeded(self) -> None:
        """Raise ``ValueError`` if the generator that the model draws from was seeded."""
        if self.was_seeded():
            message = (
                "PyTorch's global generator, from which the model draws, was seeded while it ran; let it draw from a "
                "torch.Generator() of its own"
            )
            raise ValueError(message)


def _has_generator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is given a generator other than the global one."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
    return any(generator is not _global(generator.device) for generator in given)


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return the device that a function draws on."""
    device = kwargs.get("device")
    if device is None:
        for value in (kwargs.get("out"), *args, *kwargs.values()):
            if isinstance(value, Tensor):
                return value.device
    return torch.empty(0, device=device).device


# --- The generators --------------------------------------------------------------------------------

_lock = threading.RLock()
_generators: dict[torch.device, torch.Generator] = {}

#: XORed into the seeds: with the seed of the global generators, the numbers would be the same.
_OTHER: Final = 0x9E3779B97F4A7C15


def _own(device: torch.device) -> torch.Generator | None:
    """Return the generator used instead of the global one of ``device``; ``None`` if nothing can be drawn there."""
    seed = torch.default_generator.initial_seed() ^ _OTHER
    with _lock:
        generator = _generators.get(device)
        if generator is None:
            try:
                generator = _generators[device] = torch.Generator(device)
            except RuntimeError:  # a device without random numbers, such as "meta"
                return None
        if generator.initial_seed() != seed:
            generator.manual_seed(seed)
        return generator


def _global(device: torch.device) -> torch.Generator | None:
    """Return PyTorch's generator of ``device``."""
    if device.type == "cpu":
        return torch.default_generator
    on_devices = getattr(getattr(torch, device.type, None), "default_generators", ())
    return next(iter(on_devices[device.index or 0 :]), None)


@contextmanager
def _instead_of_global(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Give the global generators the state of ours, for one call of a function that takes no generator.

    If another thread draws at the very moment at which the states are exchanged, it may draw a number twice.
    """
    given = {value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
    pairs = [(_global(device), _own(device)) for device in {torch.device("cpu"), *given}]
    with _lock:
        changed = [(theirs, ours, theirs.get_state()) for theirs, ours in pairs if theirs and ours]
        for theirs, ours, _ in changed:
            theirs.set_state(ours.get_state())
        try:
            yield
        finally:
            for theirs, ours, state in changed:
                ours.set_state(theirs.get_state())
                theirs.set_state(state)
