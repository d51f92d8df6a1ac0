"""For your own tests: a check that no hook was left on a model.

>>> import torch
>>> from actrec import record, testing
>>> model = torch.nn.Linear(4, 3)
>>> with record(model, "") as acts:
...     output = model(torch.ones(2, 4))
>>> testing.assert_unhooked(model)
"""

from __future__ import annotations

from torch import nn

from actrec._calls.forwards import Forward
from actrec._calls.hooks import Hook

from ._text import listed
from ._torch import hook_tables
from .errors import OptionError

__all__ = ["assert_unhooked"]


def assert_unhooked(model: nn.Module) -> None:
    """Raise ``AssertionError`` if a hook of actrec is on ``model`` or on a module in it.

    >>> from torch import nn
    >>> from actrec import record
    >>> from actrec.testing import assert_unhooked
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> with record(model, "0"):  # doctest: +ELLIPSIS
    ...     assert_unhooked(model)
    Traceback (most recent call last):
    AssertionError: assert_unhooked(): hooks of actrec are on '', '0' of this Sequential...
    >>> assert_unhooked(model)

    Call it after the block. Hooks of others do not count, and nothing is changed.

    Args:
        model: the recorded model.

    Raises:
        AssertionError: a hook is left; the message names the modules.
        OptionError: ``model`` is not a module.
    """
    given: object = model
    if not isinstance(given, nn.Module):
        message = f"assert_unhooked({given!r}): expected the model, a torch.nn.Module, got a {type(given).__name__}."
        raise OptionError(message)
    hooked = [name for name, module in model.named_modules() if _has_hooks(module)]
    if hooked:
        message = (
            f"assert_unhooked(): hooks of actrec are on {listed(hooked)} of this {type(model).__name__}. Is a "
            "record() block still running, or a generator that holds one still alive?"
        )
        raise AssertionError(message)


def _has_hooks(module: nn.Module) -> bool:
    if isinstance(vars(module).get("forward"), Forward):
        return True
    return any(isinstance(hook, Hook) for table in hook_tables(module) for hook in table.values())
