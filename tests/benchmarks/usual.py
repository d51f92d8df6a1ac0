"""What people write without actrec: a hook on every leaf. Context managers, as ``record()`` is one."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import nn

Store = dict[str, list[Any]]


def leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if not m._modules]


def exact(model: nn.Module, batches: Iterable[Any], recorded: Mapping[str, Sequence[Any]]) -> bool:
    """Whether ``recorded`` is what every leaf returned for the batches, in all of its calls."""
    with clone_hook(model) as reference:
        for batch in batches:
            model(batch)
    return all(
        len(recorded.get(name, ())) == len(values)
        and all(torch.equal(a, b) for a, b in zip(values, recorded[name], strict=True))
        for name, values in reference.items()
    )


@contextmanager
def no_hook(model: nn.Module) -> Iterator[None]:
    """The forward as it is."""
    yield


@contextmanager
def _hooks(
    model: nn.Module, hook_for: Callable[[Store, str], Any], register: str = "register_forward_hook"
) -> Iterator[Store]:
    store: Store = defaultdict(list)
    handles = [getattr(module, register)(hook_for(store, name)) for name, module in leaves(model)]
    yield store
    for handle in handles:
        handle.remove()


def no_op_hook(model: nn.Module):
    """A hook that does nothing."""

    def hook_for(store, name):
        def hook(module, args, output):
            pass

        return hook

    return _hooks(model, hook_for)


def classic_hook(model: nn.Module):
    """The recipe of every forum. On the CPU it keeps an alias, which in-place operations rewrite."""

    def hook_for(store, name):
        def hook(module, args, output):
            store[name].append(output.detach().cpu())

        return hook

    return _hooks(model, hook_for)


def clone_hook(model: nn.Module):
    """The recipe made right: a pass over memory for every value."""

    def hook_for(store, name):
        def hook(module, args, output):
            store[name].append(output.detach().clone())

        return hook

    return _hooks(model, hook_for)


def pooling_hook(model: nn.Module, pool: Callable[[Any], Any]):
    """A hook that keeps a reduced value: right, for the reduction makes a tensor of its own."""

    def hook_for(store, name):
        def hook(module, args, output):
            store[name].append(pool(output.detach()))

        return hook

    return _hooks(model, hook_for)


@contextmanager
def classic_hook_pair(model: nn.Module) -> Iterator[tuple[Store, Store]]:
    """The recipe for what a layer receives, beside the one for what it returns."""

    def hook_for(store, name):
        def hook(module, args):
            store[name].append(args[0].detach().cpu())

        return hook

    with (
        _hooks(model, hook_for, "register_forward_pre_hook") as received,
        classic_hook(model) as returned,
    ):
        yield received, returned
