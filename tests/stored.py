"""What the tests of the store share: comparing values bit for bit, and small models to record."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from actrec import Opaque
from actrec.store.call import Call, Look
from actrec.store.description import Description, LayerInfo
from actrec.store.format import Slot
from actrec.store.ledger import Commit, Ledger
from actrec.store.new_shard import lay_out
from actrec.store.new_shard import write as write_shard

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from actrec import Recording
    from actrec.store import StoredRecording
    from actrec.store.shard import Shard


def opened_shards(acts: StoredRecording, rank: int = 0) -> list[Shard]:
    """The shards that a rank has written."""
    found = acts._ranks[rank]
    return [found.shard(number) for number in range(found.count)]


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor, NaN payloads and all."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(a: Any, b: Any) -> bool:  # noqa: PLR0911  # a table, in effect
    """Whether two values are the same, bit for bit, and of the same types."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        return both and bits(a) == bits(b)
    if type(a).__module__ == "numpy" or type(b).__module__ == "numpy":
        return type(a) is type(b) and a.dtype == b.dtype and same(*map(torch.as_tensor, (a, b)))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=False)
        return len(a) == len(b) and all(same(list(x), list(y)) for x, y in pairs)
    if isinstance(a, (tuple, list, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return bool(a == b) if not isinstance(a, Opaque) else a.type == b.type


def assert_same(found: Recording, expected: Recording) -> None:
    """Two recordings hold the same."""
    assert list(found) == list(expected)
    assert found.num_passes == expected.num_passes
    for name in expected:
        assert (found[name].name, found[name].type) == (expected[name].name, expected[name].type)
        assert found[name].passes == expected[name].passes, name
        assert len(found[name]) == len(expected[name])
        pairs = zip(found[name], expected[name], strict=True)
        assert [i for i, (a, b) in enumerate(pairs) if not same(a, b)] == [], name
    if getattr(expected, "inputs", None) is not None:
        assert_same(found.inputs, expected.inputs)  # type: ignore[attr-defined]


class Net(nn.Module):
    """Writes in place to what its layers return, shares memory between layers, calls one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout()
        self.flat = nn.Flatten()
        self.head = nn.Linear(6 * 36, 6 * 36)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.flat(self.drop(x))
        y = self.relu(self.head(x))
        y += x
        return y


def batches(count: int, size: int = 16) -> list[Tensor]:
    """The same images at every call."""
    images = torch.randn(count * size, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return list(images.split(size))


class Shards:
    """Writes shards without a model, a thread or a disk that is waited for: a rank's folder, as a writer would leave it.

    Args:
        path: of the recording.
        layers: the names of its layers.
    """

    def __init__(self, path: Path, layers: Sequence[str], *, rank: int = 0, ranks: int = 1) -> None:
        self.folder = path / f"rank-{rank:05d}"
        self.folder.mkdir(parents=True)
        self.slots = [Slot("output", at, name, "Identity") for at, name in enumerate(layers)]
        info = tuple(LayerInfo(slot.name, slot.type) for slot in self.slots)
        described = Description("Model", info, recording="0" * 32, ranks=ranks, began=1)
        (self.folder / "rank.json").write_bytes(described.content())
        self.ledger = Ledger(described.heading(rank))

    def write(
        self,
        calls: Iterable[tuple[int, int, Tensor]],
        committed: int,
        structure: str = '{"tensor":0}',
        **more: Any,
    ) -> Path:
        """Write a shard of calls: the number of the layer, that of the pass, and the tensor of the value."""
        made = [
            Call(self.slots[at], number, [t], Look(structure, [(t.dtype, t.shape)]))
            for at, number, t in calls
        ]
        parts, tensors = lay_out(made)
        heading = self.ledger.next(parts, Commit(committed, **more))
        path = self.folder / f"{heading.shard:06d}.safetensors"
        with path.open("wb") as file:
            write_shard(_Plain(file), heading, self.ledger.layers, parts, tensors)
        return path

    def resume(self) -> None:
        """Go on as another run would."""
        self.ledger = self.ledger.resumed(1, 1)
        self.write([], self.ledger.heading.committed)


class _Plain:
    def __init__(self, file: Any) -> None:
        self.write = file.write
        self._file = file

    def write_at_start(self, data: bytes) -> None:
        self._file.seek(0)
        self._file.write(data)


class Operations(TorchDispatchMode):
    """Counts the operations on tensors."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # fmt: skip
        self.count += 1
        return function(*args, **(kwargs or {}))
