"""Recordings as datasets of ``torch.utils.data``, to train probes and sparse autoencoders on.

>>> import torch
>>> from torch.utils.data import DataLoader
>>> from actrec import record
>>> from actrec.data import shuffled
>>> model = torch.nn.Linear(4, 3)
>>> with record(model, "") as acts:
...     for batch, label in zip(torch.randn(2, 5, 4), torch.arange(10).split(5)):
...         output = model(batch)
...         acts.add("label", label)
>>> loader = DataLoader(shuffled(acts, "", "label", batch_size=5), batch_size=None)
>>> for hidden, label in loader:
...     print(hidden.shape, label.shape)
torch.Size([5, 3]) torch.Size([5])
torch.Size([5, 3]) torch.Size([5])

A *row* is a sample of a layer or, flattened, one position of it; the rows of several layers belong together.
:func:`rows` returns them by number, :func:`shuffled` all of them in random order, at the speed of the disk.
"""

from typing import TYPE_CHECKING, Any

from actrec._recordings.instead import no_name

from .dataset import Rows, rows
from .shuffling import Shuffled, shuffled

__all__ = ["Rows", "Shuffled", "rows", "shuffled"]

if not TYPE_CHECKING:  # hidden from type checkers, which then report missing attributes

    def __getattr__(name: str) -> Any:
        raise no_name(__name__, name, __all__)
