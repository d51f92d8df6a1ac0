"""Calls of the operator in one graph of Inductor, joined into one where the value may be told later.

The code that Inductor makes asks for the memory of each tensor that it reads as if it were to write to it. A tensor that is kept
by then shares its memory copy-on-write, and would be copied, for nothing. So values that are kept anyway are told
where the next one is, and all of them by one call, behind the code that reads them. Where they are read later still, they are copied.

In the graph that this changes nothing is written in place: a value is the same further down. Where that is not so, nothing is joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node
from typing_extensions import override

from .operator import tell

_WRITES = torch.ops.higher_order.auto_functionalized_v2
#: Where a node has what it is called with in eager mode, whose strides Inductor gives to what it is called with.
_EAGER = "eager_input_vals"
_LISTS = ("tensors", "numbers", "keys")


class Together(CustomGraphPass):
    """The pass of Inductor's that does it."""

    @override
    def __call__(self, graph: Graph) -> None:
        join(graph)

    @override
    def uuid(self) -> str:
        """What tells the code that is made so from other code, where it is kept on disk."""
        return f"{__name__} {tell}"


def join(graph: Graph) -> None:
    """Join each call that may come late with the next one."""
    waiting = None
    for node in [*graph.nodes]:
        if node.target is _WRITES and node.args == (tell,):
            if waiting is not None and node.kwargs["_all_bases"][0] in waiting.users:
                _join(waiting, node)
            waiting = node if _may_wait(node) else None
        elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            waiting = None


def _may_wait(node: Node) -> bool:
    """Whether it tells of values in memory that it may tell later; the beginning of a call is told at once if nothing is waiting."""
    values: Any = node.kwargs["tensors"]
    return bool(node.kwargs["late"] and values) and all(one.meta["val"].is_cpu for one in values)


def _join(first: Node, second: Node) -> None:
    """Let ``second`` tell what ``first`` does, before its own."""
    for token in [*first.users]:  # the token, as it is behind the call
        token.replace_all_uses_with(first.kwargs["_all_bases"][0])
        first.graph.erase_node(token)
    second.kwargs = _both(first.kwargs, second.kwargs)
    eager = [node.meta.pop(_EAGER, None) for node in (first, second)]
    if None not in eager:
        (args, before), (_, after) = eager
        second.meta[_EAGER] = args, _both(before, after)
    first.graph.erase_node(first)


def _both(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    joined = {name: type(after[name])([*before[name], *after[name]]) for name in _LISTS}
    outlines = f"{before['outlines']}\n{after['outlines']}"
    return {**after, **joined, "outlines": outlines}
