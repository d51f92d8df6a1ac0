"""Recordings on disk: larger than memory, safe against crashes, readable without actrec.

>>> import tempfile, torch, actrec
>>> from torch import nn
>>> path = tempfile.mkdtemp() + "/run"
>>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
>>> with actrec.record(model, into=path) as acts:
...     for batch in torch.randn(3, 5, 4):
...         output = model(batch)
>>> actrec.load(path)["1"].cat().shape
torch.Size([15, 3])
>>> actrec.verify(path)
[]

A thread writes the values of a recording to a path while the model continues. The format is safetensors in
a folder; the documentation has a page about it.
"""

from actrec._values.stand_ins import Fields

from .folder import Folder
from .load import load
from .rank import RankInfo
from .reader import StoredRecording
from .save import save
from .verify import verify

__all__ = ["Fields", "Folder", "RankInfo", "StoredRecording", "load", "save", "verify"]
