"""``rows()``: a dataset of the rows of a recording, by their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from actrec._recordings.recording import Recording
from actrec._text import count

from .align import Mask, Passes, RowOptions, Table, table
from .columns import named
from .kept import Kept
from .numbering import integers
from .origins import Where
from .selecting import Selector
from .sources import Files

#: Rows of the mask that are read to find one that is kept.
_BLOCK = 4096


def rows(
    recording: Recording[Any],
    *layers: Selector,
    flatten: bool = False,
    mask: Mask | None = None,
    last: bool = False,
    nth: int | None = None,
    passes: Passes = "all",
) -> Rows:
    """Return the rows of some layers as a dataset: each sample of each call is an item.

    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> from actrec import record
    >>> from actrec.data import rows
    >>> model = torch.nn.Linear(4, 3)
    >>> with record(model, "") as acts:
    ...     for batch, label in zip(torch.randn(2, 5, 4), torch.arange(10).split(5)):
    ...         output = model(batch)
    ...         acts.add("label", label)
    >>> dataset = rows(acts, "", "label")
    >>> len(dataset)
    10
    >>> hidden, label = dataset[7]
    >>> hidden.shape, label
    (torch.Size([3]), tensor(7))
    >>> for hidden, label in DataLoader(dataset, batch_size=4):
    ...     print(hidden.shape, label)
    torch.Size([4, 3]) tensor([0, 1, 2, 3])
    torch.Size([4, 3]) tensor([4, 5, 6, 7])
    torch.Size([2, 3]) tensor([8, 9])

    Rows are numbered in the order of the passes, and within a pass of the ranks, as in ``acts[name].cat()``. Passes that
    raised are left out (``acts.failed_passes``). To read a large recording in random order, :func:`shuffled` is many
    times faster.

    If each position is a row, the calls of a layer in one pass or unit, such as a prompt and the tokens that
    ``generate()`` adds to it one by one, are joined along the tokens, dimension 1: first come the rows of the first sample, in
    all calls, then those of the second. A value that was added once for all calls, such as token ids ``(batch, all tokens)``, is
    aligned with them:

    >>> steps = torch.randn(2, 5, 4), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    >>> class Generator(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(4, 3)
    ...     def forward(self, steps):
    ...         return [self.layer(step) for step in steps]
    >>> model = Generator()
    >>> with record(model, "layer") as acts:
    ...     output = model(steps)
    ...     acts.add("mask", torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))  # of the prompts
    >>> dataset = rows(acts, "layer", flatten=True, mask="mask")
    >>> len(dataset), dataset.where(3)
    (12, Where(unit=0, sample=0, position=5))
    >>> torch.equal(dataset[3], acts["layer"][1][0, 0])
    True

    Calls that cannot be joined, or for each of which a label of each sample was added, as for micro-batches, are separate
    batches, one after the other. Layers are aligned by the keys of their units if all of them have units, else by the
    numbers of their passes.

    A layer is given by its name, or as an object such as ``acts.inputs["mlp"]``. If a call returns several tensors, a tuple
    selects one: ``("lstm", 0)``. With one layer an item is a tensor, with several a tuple in their order. The names ``"unit"``,
    ``"sample"`` and ``"position"`` are columns too, unless something was recorded under them: see :meth:`Rows.where`.

    Args:
        recording: a recording in memory or stored.
        *layers: one or more layers, or values that were added.
        flatten: make a row of each position instead: ``(batch, tokens, width)`` gives ``batch * tokens`` rows of
            ``width``. A value with fewer positions, such as labels ``(batch,)`` or a vector ``(batch, width)``, is
            repeated. Integers have no width: token ids ``(batch, tokens)``, with a layer or alone, give one number
            for each row. ``(batch * tokens, experts)``, as mixtures of experts return it, has the same rows. If the
            shapes are ambiguous, such as floating-point numbers ``(batch, tokens)`` where all calls have equally many tokens,
            an error says which shapes are not: ``(batch, tokens, 1)`` or ``(batch, 1, tokens)``.
        mask: which positions count; the others, such as padding on either side, are left out. An added value or a layer with
            one number for each row, 0 to leave it out: ``flatten=True, mask="attention_mask"``. It may be longer than the tokens
            of its call, like the mask of a step with a cache: its last columns are used. With the mask of a prompt, all
            generated tokens count. Or a function that makes a mask ``(batch, tokens)`` from the stored values of a pass:
            ``mask=lambda values: values["ids"] != 0``. Or a tensor with one number for each row of all calls.
        last: make a row of each sample instead: its last position, or the last one that the mask keeps. A sample without such
            a position has no row.
        nth: for layers that are called several times in a pass, such as a ReLU that is used twice in a block, take one
            call of each pass: 0 the first, -1 the last, as :meth:`actrec.Layer.nth` does.
        passes: with ``"common"``, passes in which one of the layers was not called are left out. Otherwise they are an error.

    Returns:
        A map-style dataset.

    Raises:
        AlignmentError: the layers do not have the same calls with the same number of rows, rows differ in shape or
            dtype, or values are not tensors.
        OptionError: an argument is invalid, or no pass has so many calls as ``nth`` says.
    """
    options = RowOptions(flatten=flatten, mask=mask, nth=nth, passes=passes, last=last)
    return Rows(table("rows", recording, layers, options))


class Rows(Dataset[Any]):
    """The map-style dataset that :func:`rows` returns.

    ``dataset[7]`` is a row, ``dataset[-1]`` the last one. A slice, a list or a tensor of numbers gives their
    rows joined along a new first dimension: ``dataset[3:8]``, ``dataset[[5, 1, 1]]``. A ``DataLoader`` fetches
    a batch in one call. Fastest is a batch that is not taken apart and collated again:
    ``DataLoader(dataset, batch_size=None, sampler=BatchSampler(...))``.

    All results are copies, on the CPU, in the dtype of the recording. From a stored recording little more than the requested
    rows is read, and no file is mapped. Pickling it for worker processes copies no data, unless the recording is in memory.
    """

    def __init__(self, source: Table) -> None:
        self._columns = source.columns
        self._raised = source.raised
        self._where = source.where
        with Files() as files:
            self._kept = None if source.mask is None else Kept(source.mask, _BLOCK, files)
        self._len = len(source if self._kept is None else self._kept)

    def __len__(self) -> int:
        return self._len

    @override
    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Any:
        wanted, is_one = self._wanted(index)
        found = self._read(wanted)
        return self._as_item([column[0] for column in found] if is_one else found)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        found = self._read(self._checked(integers(indices)))
        parts = [[*column] for column in found]
        return list(parts[0] if len(parts) == 1 else zip(*parts, strict=True))

    @override
    def __repr__(self) -> str:
        each = ", ".join(f"{column.name} {column.look}" for column in self._columns)
        left_out = f", without {count(self._raised, 'pass')} that raised" if self._raised else ""
        return f"{self._len} rows of {each}{left_out}"

    def where(self, index: int | slice | Sequence[int] | Tensor) -> Where:
        """Return the origin of rows: the unit, the sample in its batch, and the position in that sample.

        >>> import torch
        >>> from actrec import record
        >>> from actrec.data import rows
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     for batch in torch.randn(2, 5, 7, 4):  # 2 batches of 5 sentences of 7 tokens
        ...         output = model(batch)
        >>> dataset = rows(acts, "", flatten=True)
        >>> unit, sample, position = dataset.where(36)
        >>> unit, sample, position
        (1, 0, 1)
        >>> torch.equal(dataset[36], acts[""][unit][sample, position])
        True
        >>> dataset.where([0, 69]).position
        tensor([0, 6])

        It is computed from the numbers of the rows, without reading the layers. The same as columns:
        ``rows(acts, "", "unit", "sample", "position", flatten=True)``.

        Args:
            index: the number of a row, or of several, as for ``dataset[index]``.

        Returns:
            A named tuple ``(unit, sample, position)``: for one row three numbers, for several three tensors ``(rows,)``. ``unit``
            is the key of the unit (for several rows a list, if keys are strings); without units the number of the pass.
            ``position`` counts the recorded positions, padding included, over all calls of the pass, and over further
            dimensions, such as heads. If a row is a sample, it is 0.

        Raises:
            IndexError: there is no such row.
        """
        wanted, is_one = self._wanted(index)
        with Files() as files:
            numbers = integers(self._located(wanted, files))
        passes, sample, position = self._where.numbers(numbers)
        units = named(self._where.units, passes)
        if not is_one:
            return Where(units, sample, position)
        (unit,) = units.tolist() if isinstance(units, Tensor) else units
        return Where(unit, sample.item(), position.item())

    def _wanted(self, index: int | slice | Sequence[int] | Tensor) -> tuple[range | Tensor, bool]:
        """Return the numbers of the requested rows, and whether a single one was requested."""
        if isinstance(index, slice):
            return range(self._len)[index], False
        if isinstance(index, int):
            if not -self._len <= index < self._len:
                raise self._outside(index)
            return range(index % self._len, index % self._len + 1), True
        numbers = self._numbers(index)
        return self._checked(numbers.view(-1)), not numbers.dim()

    def _numbers(self, index: Any) -> Tensor:
        """Return the requested numbers, given as such or as a bool for each row."""
        try:
            numbers = torch.as_tensor(index, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            numbers = None
        if numbers is None or (numbers.numel() and not _is_integral(numbers)):
            message = f"dataset[{index!r}]: rows are numbered by integers."
            raise TypeError(message)
        if numbers.dtype != torch.bool:
            return numbers.to(torch.int64)
        if numbers.shape != (self._len,):
            message = f"dataset[mask]: the mask has {numbers.numel()} elements, and there are {self._len} rows."
            raise IndexError(message)
        return numbers.nonzero()[:, 0]

    def _checked(self, numbers: Tensor) -> Tensor:
        outside = (numbers < -self._len) | (numbers >= self._len)
        if bool(outside.any()):
            raise self._outside(int(numbers[outside][0]))
        return torch.where(numbers < 0, numbers + self._len, numbers)

    def _outside(self, index: int) -> IndexError:
        return IndexError(f"dataset[{index}]: there are {self._len} rows.")

    def _read(self, wanted: range | Tensor) -> list[Any]:
        with Files() as files:
            numbers = self._located(wanted, files)
            return [column.dressed(column.rows(numbers, files)) for column in self._columns]

    def _located(self, wanted: range | Tensor, files: Files) -> range | Tensor:
        """Return the numbers of rows among all rows, kept or not."""
        return wanted if self._kept is None else self._kept.located(integers(wanted), files)

    def _as_item(self, parts: list[Tensor]) -> Any:
        return parts[0] if len(parts) == 1 else tuple(parts)


def _is_integral(numbers: Tensor) -> bool:
    return not (numbers.is_floating_point() or numbers.is_complex())
