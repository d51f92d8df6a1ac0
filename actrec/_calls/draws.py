"""Random numbers for code of the user's that runs inside the recorder: from generators of actrec's own.

PyTorch's global generators belong to the process: a state that is put back behind a transform takes back what
other threads have drawn meanwhile, and gives every call the same numbers. So the draws themselves are led
elsewhere. While :class:`OwnDraws` is entered, a function that would draw from a global generator draws from one
that actrec keeps for the device. It goes on from call to call and from block to block, and its seed is
derived from ``torch.initial_seed()``, so what is drawn is reproducible and never what the model draws.

This is a ``TorchFunctionMode``, as ``torch.set_default_device`` is one: it belongs to a thread, costs a fraction of a
microsecond to enter, and next to nothing where a function draws nothing.
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

#: What may draw from the global generators. Some of it takes a ``generator``, by the version of PyTorch.
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
    """While this is entered, what this thread draws comes from generators of actrec's own."""

    def __init__(self) -> None:  # that of the base does nothing, in a fifth of the time of all this
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
        # A generator that was seeded in here, inside fork_rng(), is to be used.
        if name not in _DRAWING or self.was_seeded() or _has_generator(args, kwargs):
            return func(*args, **kwargs)
        if PLAIN.issuperset(types):
            own = _own(_device(args, kwargs))
            try:
                return func(*args, **{**kwargs, "generator": own})
            except TypeError:  # it takes none, in this version or with these arguments
                pass
        with _instead_of_global(args, kwargs):
            return func(*args, **kwargs)

    def was_seeded(self) -> bool:
        """Whether PyTorch's global generator was given another seed since this was made."""
        return torch.default_generator.initial_seed() != self._seed

    def check_unseeded(self) -> None:
        """Raise ``ValueError`` if the generator that the model draws from was given another seed."""
        if self.was_seeded():
            message = (
                "PyTorch's global generator, from which the model draws, was seeded while it ran; let it draw from a "
                "torch.Generator() of its own"
            )
            raise ValueError(message)


def _has_generator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call says which generator to draw from: one that is not the global one."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
    return any(generator is not _global(generator.device) for generator in given)


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device that a function draws on."""
    device = kwargs.get("device")
    if device is None:
        for value in (kwargs.get("out"), *args, *kwargs.values()):
            if isinstance(value, Tensor):
                return value.device
    return torch.empty(0, device=device).device


# --- The generators --------------------------------------------------------------------------------

_lock = threading.RLock()
_generators: dict[torch.device, torch.Generator] = {}

#: What the seeds differ in from those of the global generators, which would give the same numbers.
_OTHER: Final = 0x9E3779B97F4A7C15


def _own(device: torch.device) -> torch.Generator | None:
    """The generator that stands in for the global one of ``device``; ``None`` if nothing can be drawn there."""
    seed = torch.default_generator.initial_seed() ^ _OTHER
    with _lock:
        generator = _generators.get(device)
        if generator is None:
            try:
                generator = _generators[device] = torch.Generator(device)
            except RuntimeError:  # a device without numbers, such as "meta"
                return None
        if generator.initial_seed() != seed:
            generator.manual_seed(seed)
        return generator


def _global(device: torch.device) -> torch.Generator | None:
    """The generator of ``device`` that everybody draws from."""
    if device.type == "cpu":
        return torch.default_generator
    on_devices = getattr(getattr(torch, device.type, None), "default_generators", ())
    return next(iter(on_devices[device.index or 0 :]), None)


@contextmanager
def _instead_of_global(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Let the global generators give out the numbers of ours, for one call of a function that can use no other.

    If another thread draws at the very moment in which the states are exchanged, it may draw a number again.
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
