"""Makes the recordings beside it: ``python -m tests.frozen.make``. Only where the format gets another version, into another folder.

``python -m tests.frozen.make units`` makes one of them, one that is new.

What is written into the JSON files is what was recorded in memory, not what is read again.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import actrec
from actrec import Opaque, record, reduce
from actrec.store import Folder
from actrec.store.format import DTYPES
from tests.frozen.described import described
from tests.frozen.described import value as describe
from tests.stored import Shards

HERE = Path(__file__).parent
FOLDER = HERE / "version-2"
Pair = namedtuple("Pair", ["left", "right"])  # noqa: PYI024


@dataclass
class Output:
    """What a model of a library might return."""

    hidden: Tensor
    rest: Any = None


class Net(nn.Module):
    """Returns what changes from pass to pass, calls a layer twice, and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.relu = nn.ReLU(inplace=True)
        self.rnn = nn.LSTM(2, 2)
        self.fails = False

    def forward(self, x: Tensor) -> Output:
        """Run."""
        x = self.relu(self.relu(self.linear(x)) - 0.5)
        if self.fails:
            raise ZeroDivisionError
        out, (hidden, _) = self.rnn(x)
        return Output(out, {"rows": len(x), "hidden": hidden})


def values() -> list[Any]:
    """A value of each kind that the format has words for."""
    t = torch.arange(6.0).view(2, 3)
    bits = [
        torch.arange(32 * 2, dtype=torch.uint8).view(dtype) if dtype is not torch.bool else t > 2
        for dtype, _ in DTYPES.values()
    ]
    return [
        *(tensor[:2] for tensor in bits), t.t(), t[:0], torch.tensor(7), t.expand(2, 2, 3),
        torch.tensor([float("nan"), float("-inf"), -0.0]),
        (t, [t[0], {"a": t[1], 3: (), "nothing": None}]), OrderedDict(a=t), deque([t, 1], maxlen=3), Pair(t, 1),
        t.max(0), nn.utils.rnn.pack_sequence([t[:, 0], t[:1, 1]]), Output(t, Output(t[0])), [t, t],
        np.arange(4, dtype=np.int16), np.float32(2.5), True, 3, 2**80, -(2**60), 0.1, float("nan"), float("inf"), -0.0,
        1 + 2j, 'text \u00e9\n"\\', b"\0\xff", torch.Size([2, 0]), range(3, 9, 2), slice(None, 2, None), ...,
        torch.bfloat16, torch.strided, torch.channels_last, torch.device("cpu"), int, Opaque("lib.Cache"),
        {(1, ("a", None)): {2.5: [[]]}},
    ]  # fmt: skip


def write(name: str, about: dict[str, Any]) -> None:
    (FOLDER / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")


def passes(net: Net, acts: Any, count: int) -> None:
    for number in range(acts.num_passes, count):
        output = net(torch.arange(3.0 * (number % 3 + 1)).view(-1, 3) / 7 - number)
        acts.add("number", number)
        if number % 2 == 0 and output.hidden.requires_grad:
            output.hidden.sum().backward()


def roles() -> None:
    """Outputs, inputs, gradients and added values; a pass that raised; a name that is another's."""
    torch.manual_seed(0)
    net = Net()
    net.add_module("again", net.relu)
    with record(net, ["", "linear", "relu", "again", "rnn"], inputs=True, grads=True) as acts:
        passes(net, acts, 3)
        net.fails = True
        try:
            net(torch.ones(1, 3))
        except ZeroDivisionError:
            net.fails = False
        passes(net, acts, 6)
        acts.add("label", {"late": torch.tensor([1])})
    acts.save(FOLDER / "roles")
    write("roles", described(acts, stored=False))


def kinds() -> None:
    """Every kind of value."""
    net = nn.Identity()
    found = values()
    with record(net, "", into=FOLDER / "kinds") as acts:
        for one in found:
            net(torch.ones(1))
            acts.add("value", one)
    write("kinds", {"values": [describe(one) for one in found]})


def crashed() -> None:
    """A run in parts that was left within a pass, went on, and was killed within another; in memory it was never left."""
    path = FOLDER / "crashed"

    def run(acts: Any, net: Net, count: int, *, fails: bool) -> None:
        passes(net, acts, count)
        if fails:
            net.fails = True
            net(torch.ones(1, 3))

    torch.manual_seed(0)
    net = Net()
    layers = ["linear", "relu"]
    with torch.no_grad():
        into = Folder(path, shard_bytes=1, budget=10)
        try:
            with record(net, layers, inputs=True, into=into) as acts:
                run(acts, net, 2, fails=True)
        except ZeroDivisionError:
            net.fails = False
        block = record(net, layers, inputs=True, into=into, resume=True)
        with block as acts:
            passes(net, acts, 3)
            net.linear(torch.ones(1, 3))
            time.sleep(1)  # so that all is on the disk, which no call waits for
            shutil.copytree(path, path.with_name("killed"))
        shutil.rmtree(path)
        path.with_name("killed").rename(path)
    found = actrec.load(path)
    assert not found.complete
    assert found._ranks[0].heading.void
    assert found._ranks[0].heading.parts
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad(), record(net, layers, inputs=True) as acts:
        passes(net, acts, found.num_passes)
    write("crashed", described(acts, stored=False))


def ranks() -> None:
    """Ranks that record different layers and passes, a tensor in parts, and a rank that was killed, of four."""
    path = FOLDER / "ranks"
    whole = torch.arange(12.0).view(4, 3)
    spread = {
        "shape": [4, 3],
        "placements": [["shard", 0]],
        "mesh": [2],
        "names": ["x"],
        "ranks": [0, 1],
    }
    for rank, names in enumerate((["a", "parts"], ["parts", "b", "a"], ["a"])):
        shards = Shards(path, names, rank=rank, ranks=4)
        for number in range(rank + 1):
            calls = [(names.index("a"), number, torch.tensor([10.0 * rank + number]))]
            shards.write(calls, number + 1)
        if rank < 2:
            part = whole[:3] if rank == 0 else whole[3:]
            structure = json.dumps({"list": [{"dtensor": 0, **spread}, 5]}, separators=(",", ":"))
            shards.write([(names.index("parts"), rank + 1, part)], rank + 2, structure)
            shards.write([(names.index("parts"), 5, part)], 6, structure, ended="")
    a = [(0, 0, 0.0), (0, 1, 10.0), (0, 2, 20.0), (1, 1, 11.0), (1, 2, 21.0), (2, 2, 22.0)]
    write("ranks", {
        "names": ["a", "parts", "b"], "num_passes": 6, "complete": False,
        "ranks": [
            [0, 6, True, None], [1, 6, True, None], [2, 3, False, "killed or still recording"], [3, 0, False, "wrote nothing"],
        ],
        "a": [[number, rank, describe(torch.tensor([v]))] for number, rank, v in a],
        "parts": [[5, 0, describe([whole, 5])]],
    })  # fmt: skip


KEPT = ["linear", "relu:relu", ":sub", "mask"]


def of_units(into: Any, rank: int) -> Any:
    """Units of one rank, one of which fails; functions, gradients and reductions."""
    torch.manual_seed(rank)
    net = Net()
    layers: dict[Any, Any] = {
        "linear": None,
        "relu:relu": None,
        ":sub": None,
        "relu": reduce.Moments(),
        "rnn": (first, reduce.TopK(k=2)),
    }
    with record(net, layers, grads="linear", into=into) as acts:
        for key in ("a", "b", "c"):
            net.fails = key == "b"
            try:
                with acts.unit(f"{key}{rank}"):
                    for rows in (2, 1):
                        net(torch.randn(rows, 3)).hidden.sum().backward()
                    acts.add("mask", torch.tensor([key == "a"]))
            except ZeroDivisionError:
                pass
    return acts


def first(value: tuple[Tensor, Any]) -> Tensor:
    return value[0]


def units() -> None:
    """What two ranks have recorded in units."""
    expected = [of_units(list, rank) for rank in range(2)]
    for rank in range(2):
        of_units(Folder(FOLDER / "units", rank=rank, world_size=2, run="frozen"), rank)
    write("units", {
        "ranks": [
            {
                "units": {name: list(acts[name].units) for name in KEPT},
                "layers": {name: [describe(one) for one in acts[name]] for name in KEPT},
                "grads": [describe(one) for one in acts.grads["linear"]],
                "reduced": {name: describe(acts[name].compute()) for name in ("relu", "rnn")},
            }
            for acts in expected
        ]
    })  # fmt: skip


if __name__ == "__main__":
    if not sys.argv[1:]:
        shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(exist_ok=True)
    for make in (roles, kinds, crashed, ranks, units):
        if make.__name__ in (sys.argv[1:] or [make.__name__]):
            make()
    for left in [*FOLDER.rglob("writer.lock"), *FOLDER.rglob("*.tmp")]:
        left.unlink()
