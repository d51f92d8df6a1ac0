"""``shuffled()``: batches of shuffled rows, read in the order of the disk. The order is drawn in ``row_order.py``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import index
from typing import Any, Final

from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import override

from actrec._rank import placed
from actrec._recordings.recording import Recording
from actrec.errors import OptionError, ResumeError
from actrec.store.folder import given_rank

from .ahead import ahead
from .align import Mask, Passes, RowOptions, Table, table
from .between import Between
from .kept import Kept, counts_of
from .mixing import RecordedRows, check_for_several, checked_weights, parts, quotas
from .row_order import Order
from .selecting import Selector
from .sources import Files
from .window import Window, batches

_MEBI: Final = 1 << 20
_BUFFER: Final = 256 * _MEBI
#: A block is at most this fraction of the buffer, so that a window has rows from at least so many blocks.
_BLOCKS_PER_BUFFER: Final = 64
#: So many small batches, up to a mebibyte, are made at a time.
_BATCHES_AT_ONCE: Final = 64
#: The bytes that each row takes while a window is permuted, besides its data.
_BYTES_PER_NUMBER: Final = 32


def shuffled(
    recording: Recording[Any] | Sequence[Recording[Any]],
    *layers: Selector,
    batch_size: int,
    seed: int = 0,
    buffer: int = _BUFFER,
    flatten: bool = False,
    mask: Mask | None = None,
    last: bool = False,
    nth: int | None = None,
    passes: Passes = "all",
    weights: Sequence[float] | None = None,
    drop_last: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
) -> Shuffled:
    """Return shuffled batches of the rows of some layers, to train on, at the speed of reading the disk in order.

    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> from actrec import record
    >>> from actrec.data import shuffled
    >>> model = torch.nn.Linear(4, 3)
    >>> with record(model, "") as acts:
    ...     for batch, label in zip(torch.randn(2, 5, 4), torch.arange(10).split(5)):
    ...         output = model(batch)
    ...         acts.add("label", label)
    >>> dataset = shuffled(acts, "", "label", batch_size=4)
    >>> for hidden, label in DataLoader(dataset, batch_size=None):
    ...     print(tuple(hidden.shape), len(label))
    (4, 3) 4
    (4, 3) 4
    (2, 3) 2

    Items are whole batches, so a ``DataLoader`` needs ``batch_size=None``. While the program works with a batch, a thread
    makes the next one, so no workers are needed; there may be any number: ``DataLoader(dataset, batch_size=None, num_workers=4)``.

    The recording is cut into blocks of about a mebibyte. Each epoch permutes the blocks; as many as fit into
    the buffer are read, in the order of the disk, and their rows are permuted. Every row is in exactly one batch. The order
    depends on the seed, the epoch, the recording, the options and the number of ranks (and on PyTorch's generator of
    permutations), not on the number of workers, which divide one buffer among them.

    Several recordings, such as those of two models or of two corpora, in memory or stored, make one loader with rows of the
    same layers of each:

    >>> dataset = shuffled([acts, acts], "", "recording", batch_size=3, weights=[2, 1])
    >>> torch.cat([recording for hidden, recording in dataset]).bincount()
    tensor([10,  5])

    Args:
        recording: a recording in memory or stored; or a list of several.
        *layers: as in :func:`rows`. With one layer, batches are tensors, with several, tuples of tensors.
        batch_size: the number of rows in a batch; the last batch may have fewer.
        seed: another seed gives another order.
        buffer: the bytes of rows held in memory, in all workers together, besides the current batch and the next one. A
            larger buffer mixes rows better.
        flatten: make a row of each position, as in :func:`rows`.
        mask: which rows count, as in :func:`rows`. It is read once, when this is called.
        last: take the last position of each sample, as in :func:`rows`.
        nth: which call of each pass to take, as in :func:`rows`.
        passes: whether to leave out passes that a layer does not have, as in :func:`rows`.
        weights: the proportions of rows of several recordings: with ``[2, 1]``, two rows of the first for each of the second.
            An epoch ends when all rows of the recording with the fewest rows for its weight were used; no row is used twice, and
            another epoch has other rows of the other recordings. By default an epoch has all rows of all recordings.
        drop_last: leave out the rows that do not fill a batch. All ranks then have the same number of batches.
        rank: which of ``world_size`` parts of the rows to use. By default the rank in ``torch.distributed`` if it is
            initialised, or in the variables ``RANK`` and ``WORLD_SIZE`` of ``torchrun``.
        world_size: the number of ranks. Their parts do not overlap, and differ by at most one row.

    Returns:
        A dataset for ``torch.utils.data.DataLoader(dataset, batch_size=None)``, or to be iterated over directly.

    Raises:
        AlignmentError: the layers do not have the same rows, as in :func:`rows`.
        OptionError: a size is not a positive whole number, the seed is not a whole number, or there is no such rank.
    """
    rank, world_size = given_rank("shuffled", rank, world_size) or placed()
    _check(batch_size=batch_size, buffer=buffer)
    if not hasattr(seed, "__index__"):
        message = f"shuffled(seed={seed!r}): expected a whole number, such as 0."
        raise OptionError(message)
    options = RowOptions(flatten=flatten, mask=mask, nth=nth, passes=passes, last=last)
    recordings: list[Any] = [*recording] if isinstance(recording, (list, tuple)) else [recording]
    exact = checked_weights(weights, len(recordings))
    if len(recordings) > 1:
        check_for_several(layers, mask)
    tables = [
        table("shuffled", one, layers, options, as_stored=True, number=number)
        for number, one in enumerate(recordings)
    ]
    if not tables:
        message = "shuffled([]): there is no recording in the list."
        raise OptionError(message)
    width = sum(column.width for column in tables[0].columns)
    block = max(1, min(_MEBI, buffer // _BLOCKS_PER_BUFFER) // max(1, width))
    with Files() as files:
        kept = [None if one.mask is None else Kept(one.mask, block, files) for one in tables]
    counts = [
        counts_of(len(one), block) if mine is None else mine.counts
        for one, mine in zip(tables, kept, strict=True)
    ]
    order = Order(
        counts=counts,
        quotas=quotas([int(one.sum()) for one in counts], exact),
        window=max(1, buffer // (width + _BYTES_PER_NUMBER)),
        batch_size=batch_size,
        seed=index(seed),
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
    )
    return Shuffled(parts(tables, kept), order, block, buffer, _identity(tables, order))


def _check(**sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            message = f"shuffled({name}={size!r}): expected a whole number greater than 0."
            raise OptionError(message)


@dataclass
class _Progress:
    """The progress of an epoch."""

    epoch: int
    first: int = 0  # the batch from which on the workers divide the batches
    done: int = 0  # the batches that this worker has made since
    worker: int = 0
    workers: int = 1


class Shuffled(IterableDataset[Any]):
    """The iterable dataset of batches that :func:`shuffled` returns.

    **Epochs.** Each iteration is an epoch, with its own order; the first one is epoch 0. Each worker process
    has a copy of the dataset, which a ``DataLoader`` makes again for every epoch unless its workers
    persist. So with workers, set the epoch, as for PyTorch's distributed sampler:

    .. code-block:: python

        for epoch in range(10):
            dataset.set_epoch(epoch)
            for batch in loader:
                ...

    **Resuming in the middle of an epoch.** ``state_dict()`` has the number of the next batch, and ``load_state_dict()``
    continues exactly there, with any number of workers. ``StatefulDataLoader`` of torchdata calls both itself, in its
    workers too. With workers of a plain ``DataLoader``, pass the number of batches of the epoch that you have used:
    ``state_dict(batches=step)``.

    **Memory.** The buffer and two batches, whatever the size of the recording; from an object store, also the 16 blocks that
    are being downloaded. A stored recording is read, not mapped; the system frees its file cache when memory is needed.

    ``len(dataset)`` is the number of batches in an epoch, for this rank.
    """

    def __init__(
        self, parts: Sequence[RecordedRows], order: Order, block: int, buffer: int, identity: str
    ) -> None:
        self._columns = parts[0].columns
        self._parts = parts
        self._order = order
        self._block = block
        self._next = _Progress(epoch=0)
        self._now: _Progress | None = None
        self._between = Between()
        self._identity = {
            "recording": identity,
            "rows": sum(order.quotas),
            "batch_size": order.batch_size,
            "seed": order.seed,
            "buffer": buffer,
            "world_size": order.world_size,
            "drop_last": order.drop_last,
        }

    def __len__(self) -> int:
        return self._order.batches

    @override
    def __repr__(self) -> str:
        names = ", ".join(column.name for column in self._columns)
        return f"{len(self)} batches of {self._order.batch_size} shuffled rows of {names}"

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of an epoch.

        >>> import torch
        >>> from actrec import record
        >>> from actrec.data import shuffled
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     output = model(torch.randn(10, 4))
        >>> dataset = shuffled(acts, "", batch_size=2)
        >>> dataset.set_epoch(1)
        >>> dataset.state_dict()["epoch"]
        1

        Args:
            epoch: the number of the epoch. If a loaded state is in this epoch, the iteration continues after it.
        """
        epoch = index(epoch)  # as a plain int: the order depends on its repr
        if self._next.epoch != epoch:
            self._next = _Progress(epoch)
        self._now = None

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Return the position of the iteration, as numbers and strings: after the latest batch, or after ``batches``.

        >>> import torch
        >>> from actrec import record
        >>> from actrec.data import shuffled
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     output = model(torch.randn(10, 4))
        >>> dataset = shuffled(acts, "", batch_size=2)
        >>> batches = iter(dataset)
        >>> first, second = next(batches), next(batches)
        >>> state = dataset.state_dict()
        >>> again = shuffled(acts, "", batch_size=2)
        >>> again.load_state_dict(state)
        >>> torch.equal(next(iter(again)), next(batches))
        True

        Args:
            batches: how many batches of the epoch were used; by default those that this process has returned.

        Returns:
            A dict for :meth:`load_state_dict`, which can be stored as JSON.
        """
        progress = self._now or self._next
        if batches is not None:
            progress = _Progress(progress.epoch, batches)
        return {**vars(progress), **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, at the next iteration, after the batches of a state.

        >>> import torch
        >>> from actrec import record
        >>> from actrec.data import shuffled
        >>> model = torch.nn.Linear(4, 3)
        >>> with record(model, "") as acts:
        ...     output = model(torch.randn(10, 4))
        >>> dataset = shuffled(acts, "", batch_size=2)
        >>> dataset.load_state_dict(dataset.state_dict(batches=3))
        >>> len(list(dataset))
        2

        After a state at the end of an epoch the iteration has no batches, and the one after it is the next epoch.

        Args:
            state: the result of :meth:`state_dict`.

        Raises:
            ResumeError: the state belongs to another recording or other options; the message says which.
        """
        for name, own in self._identity.items():
            if name not in state or state[name] != own:
                found = repr(state[name]) if name in state else "none at all"
                message = (
                    f"load_state_dict(): the state has {name}={found}, and this dataset has {name}={own!r}. The "
                    "order of the batches would be different."
                )
                raise ResumeError(message)
        progress = _Progress(**{name: int(state[name]) for name in vars(_Progress(0))})
        if progress.workers == 1:  # the new workers divide the rest
            progress = _Progress(progress.epoch, progress.first + progress.done)
        self._next, self._now = progress, None

    @override
    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        now = self._next
        if now.workers > 1 and (now.worker, now.workers) != (worker, workers):
            message = (
                f"the state is that of worker {now.worker} of {now.workers}, and this is worker {worker} of {workers}. "
                "Continue with the same number of workers."
            )
            raise ResumeError(message)
        now.worker, now.workers = worker, workers
        self._now, self._next = now, _Progress(now.epoch + 1)
        return self._batches_from(now)

    def _batches_from(self, now: _Progress) -> Iterator[Any]:
        first = now.first + now.worker + now.done * now.workers
        mine = range(first, self._order.batches, now.workers)
        width = sum(column.width for column in self._columns)
        many = min(_BATCHES_AT_ONCE, max(1, _MEBI // max(1, width * self._order.batch_size)))
        with Files(self._between if now.workers > 1 else None) as files:
            window = Window(self._parts, self._block, files, self._order.most(now.workers))
            made = batches(self._columns, window, self._order, now.epoch, mine)
            with closing(ahead(made, many)) as coming:
                for batch in coming:
                    now.done += 1
                    yield batch


def _identity(tables: Sequence[Table], order: Order) -> str:
    """Return a text that identifies the recordings and the selected rows."""
    found = []
    for one in tables:
        columns = (*one.columns, *filter(None, [one.mask]))
        found.append((one.origins, [(c.name, str(c.dtype), c.shape) for c in columns]))
    about = found[0] if len(found) == 1 else (found, order.quotas)
    return hashlib.blake2b(repr(about).encode(), digest_size=8).hexdigest()
