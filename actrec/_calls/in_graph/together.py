"""A pass over the graphs of Inductor that joins calls of the operator, where their values may be recorded later.

A tensor that is recorded shares its memory copy-on-write. Inductor's code requests the memory of each tensor as if to write
to it, also where it only reads, so each recorded tensor would be copied. The pass moves a call down to
the next one, and joins the two: the values are recorded after most of the code that reads them, and Python is called once.

Nothing is written in place in the graphs at this point, so a value is the same further down. Where something is, calls stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from actrec._torch import EAGER_VALUES, writes

from .operator import tell

_WRITES = torch.ops.higher_order.auto_functionalized_v2
_LISTS = ("tensors", "numbers", "keys")


def join(graph: Graph) -> None:
    """Join each call that may come late with the next call, unless something is written in between."""
    waiting = None
    for node in [*graph.nodes]:
        if node.target is _WRITES and node.args == (tell,):
            if waiting is not None and {*waiting.users} == {*node.kwargs["_all_bases"]}:
                _join(waiting, node)
            waiting = node if _may_wait(node) else None
        elif writes(node.target):
            waiting = None


def _may_wait(node: Node) -> bool:
    """Whether a call may come late: values on the CPU may; that a pass begins is told at once, where no value waits."""
    values: Any = node.kwargs["tensors"]
    return bool(node.kwargs["late"] and values) and all(one.meta["val"].is_cpu for one in values)


def _join(first: Node, second: Node) -> None:
    """Let ``second`` tell what ``first`` does, before its own."""
    tokens: Any = first.kwargs["_all_bases"]
    for token in [*first.users]:  # as it is after the call
        token.replace_all_uses_with(tokens[0])
        first.graph.erase_node(token)
    second.kwargs = _both(first.kwargs, second.kwargs)
    eager = [node.meta.pop(EAGER_VALUES, None) for node in (first, second)]
    if None not in eager:
        (args, before), (_, after) = eager
        second.meta[EAGER_VALUES] = args, _both(before, after)
    first.graph.erase_node(first)


def _both(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    joined = {name: type(after[name])([*before[name], *after[name]]) for name in _LISTS}
    outlines = f"{before['outlines']}, {after['outlines']}"
    return {**after, **joined, "outlines": outlines}
