"""The layers of a model as a table: what can be recorded, and what a query would choose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter
from typing_extensions import override

from actrec._selection.names import type_name
from actrec._selection.queries import Query, Transform
from actrec._selection.selection import Choice, select
from actrec._tables.rows import Rows
from actrec._tables.table import Column, Table
from actrec._text import count, listed, shown
from actrec.errors import ActrecError, SelectionError


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer of a model: see :class:`Layers`."""

    layer: str
    type: str
    parameters: int
    also: tuple[str, ...]


class Layers(Rows[LayerRow]):
    """The layers of a model: a tuple of rows that prints as a table.

    >>> import torch, actrec
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> [row.layer for row in actrec.layers(model)]
    ['', '0', '1']

    ==============  ==========================================================================
    ``layer``       the name that :func:`actrec.record` takes; ``''`` is the model itself
    ``type``        the type of the module
    ``parameters``  the number of elements of its parameters, including those of the modules in it
    ``also``        its other names, if a module is used in several places
    ==============  ==========================================================================
    """

    model: str = ""

    @override
    def _table(self) -> Table:
        columns = (
            Column("layer"),
            Column("type"),
            Column("parameters", is_number=True),
            Column("also", usual=("",)),
        )
        rows = [
            (
                shown(row.layer),
                shown(row.type),
                f"{row.parameters:,}",
                listed(row.also, most=3),
            )
            for row in self
        ]
        title = f"{count(len(self), 'layer')} of {shown(self.model)}"
        return Table(title, columns, rows, [row.layer for row in self])


def layers(
    model: nn.Module,
    layers: Query | Iterable[Query] | Mapping[Query, Transform | None] | None = None,
) -> Layers:
    """Return the layers of a model that can be recorded, or those that a query would choose.

    >>> import torch, actrec
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> actrec.layers(model)
    4 layers of Sequential
    layer  type        parameters
    ''     Sequential          23
    0      Linear              15
    1      ReLU                 0
    2      Linear               8
    >>> actrec.layers(model, torch.nn.Linear)
    2 layers of Sequential
    layer  type    parameters
    0      Linear          15
    2      Linear           8

    The model is neither called nor changed. Functions that its modules call, such as ``x + y``, can be recorded too, but their
    names are known only when the model is called: ``record(model, "**:*")`` records all of them, in execution order.

    Args:
        model: any ``torch.nn.Module``.
        layers: the layer queries, as :func:`actrec.record` takes them; by default every module that can be recorded. (Containers
            such as ``ModuleList`` cannot: they are never called.)

    Returns:
        A :class:`Layers`: a tuple of rows, in the order of the model or of the queries. ``pandas.DataFrame(layers(model))``
        makes a data frame of it.

    Raises:
        UnsupportedModelError: ``model`` is not a module, or is of a kind in which hooks never run.
        SelectionError: a query matches nothing, or only containers; or it asks for functions.
        OptionError: a value of a mapping is not a transform.
    """
    queries = (lambda *_: True) if layers is None else layers
    try:
        selection = select(model, queries)
    except ActrecError as error:  # its message names record()
        raise type(error)(re.sub(r"^record\(\)", "layers()", str(error))) from None
    if selection.functions:
        message = (
            f"layers(): {selection.functions[0].query!r} asks for functions, which are known only when the model is called: call it "
            "in record(model, '**:*'), which records all of them."
        )
        raise SelectionError(message)
    found = Layers(_row(choice) for choice in selection.choices)
    found.model = type_name(model)
    return found


def _row(choice: Choice) -> LayerRow:
    parameters = choice.module.parameters()
    size = sum(one.numel() for one in parameters if not isinstance(one, UninitializedParameter))
    also = tuple(name for name in choice.names if name != choice.key)
    return LayerRow(choice.key, type_name(choice.module), size, also)
