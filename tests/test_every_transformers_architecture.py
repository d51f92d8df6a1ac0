"""Architectures of ``transformers`` are recorded exactly, and compute what they would have computed unrecorded.

Models are built from tiny configurations: nothing is downloaded. They bring what ``torch.nn`` alone does
not: output dataclasses inside output dataclasses, caches that grow, tied weights, layers that are called
several times or skipped by chance, hooks that a model installs on itself, and in-place operations.

Nothing here trusts actrec. What a call returned is what a plain hook saw, cloned, in the same forward;
what a model computes is what its twin computes, which is built alike, seeded alike and never recorded.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import DynamicCache, set_seed

from actrec import Opaque, UnusedLayerWarning, _snapshot, record

from .test_every_torch_module import (
    _one_thread,  # noqa: F401  # a fixture, for every test here too
    assert_same,
    cloned,
    gradients,
    hooks_of,
    overwrite,
    tensors_in,
)

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
