"""Every leaf of a network recorded, over five batches: actrec against the libraries that can do it, as they are from PyPI.

A row says how long the other one takes for each second of actrec's. Both call the model themselves, in the same process
and without gradients, and both begin with the bare model: what a library does to a model before it can be recorded
belongs to recording it. *Exact* says whether what was recorded is what every leaf returned, in each of its calls: a
library that keeps the last call of a module, or an alias that the next layer writes into, is not.

They live in a session of their own (``nox -s peers``) and never become dependencies.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from actrec import record
from tests.benchmarks import page, report
from tests.benchmarks.models import GPT, mlp, resnet
from tests.benchmarks.timing import Row, ratios, take_turns
from tests.benchmarks.usual import classic_hook, clone_hook, exact, leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    Batches = Sequence[Tensor]
    Recorded = Mapping[str, Sequence[Any]]

NOT_SLOWER = 1.0  # what actrec may take of the time of anyone who is exact


def recorded_in(
    hooked: Callable[..., AbstractContextManager[Recorded]],
    model: nn.Module,
    batches: Batches,
    _names: list[str],
) -> Recorded:
    """What a block of hooks has recorded."""
    with hooked(model) as recorded:
        for batch in batches:
            model(batch)
    return recorded


def captum(model: nn.Module, batches: Batches, names: list[str]) -> Recorded:
    from captum.attr import LayerActivation

    layers = LayerActivation(model, [model.get_submodule(name) for name in names])
    return _columns(names, (layers.attribute(batch) for batch in batches))


def nnsight(model: nn.Module, batches: Batches, names: list[str]) -> Recorded:
    from nnsight import NNsight

    wrapped = NNsight(model)

    def outputs(batch: Tensor) -> list[Tensor]:
        with wrapped.trace(batch):
            found = [wrapped.get(name).output for name in names].save()
        return found  # noqa: RET504  # nnsight runs the block elsewhere, and hands back what has a name

    return _columns(names, map(outputs, batches))


def surgeon_pytorch(model: nn.Module, batches: Batches, names: list[str]) -> Recorded:
    from surgeon_pytorch import Inspect

    inspect = Inspect(model, names)
    return _columns(names, (inspect(batch)[1] for batch in batches))


def tdhook(model: nn.Module, batches: Batches, names: list[str]) -> Recorded:
    from tdhook.latent.activation_caching import ActivationCaching
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule

    module = TensorDictModule(model, in_keys=["x"], out_keys=["y"])
    with ActivationCaching(".*").prepare(module) as hooked:
        caches = [hooked(TensorDict({"x": batch}))["cache"] for batch in batches]
    return _columns(names, ([cache[f"module.{name}"] for name in names] for cache in caches))


def torchextractor(model: nn.Module, batches: Batches, names: list[str]) -> Recorded:
    from torchextractor import Extractor

    extractor = Extractor(model, names)
    found = (extractor(batch)[1] for batch in batches)
    recorded = _columns(names, ([outputs[name] for name in names] for outputs in found))
    for handle in extractor.hook_handles:
        handle.remove()
    return recorded


def torchlens(model: nn.Module, batches: Batches, names: list[str]) -> Recorded:
    import torchlens

    recorded = defaultdict(list)
    for batch in batches:
        modules = torchlens.trace(model, batch).modules
        for name in names:
            calls = modules[name].calls
            recorded[name] += [calls[at].out for at in range(len(calls))]
    return recorded


def _columns(names: list[str], rows: Iterable[Sequence[Tensor]]) -> Recorded:
    """For each layer the outputs of all batches, out of the outputs of all layers for each batch."""
    return dict(zip(names, zip(*rows, strict=True), strict=True))


WAYS: dict[str, tuple[str, Callable[..., Recorded]]] = {  # and the package they come from
    "a hook that clones": ("torch", partial(recorded_in, clone_hook)),
    "classic hook": ("torch", partial(recorded_in, classic_hook)),
    "captum": ("captum", captum),
    "nnsight": ("nnsight", nnsight),
    "surgeon-pytorch": ("surgeon-pytorch", surgeon_pytorch),
    "tdhook": ("tdhook", tdhook),
    "torchextractor": ("torchextractor", torchextractor),
    "torchlens": ("torchlens", torchlens),
}


def measure(*, quick: bool) -> Iterator[Row]:
    for what, model, x in _small() if quick else _works():
        model.eval()
        names = _executed(model, x)
        batches = [x.roll(shift, 0) for shift in range(2 if quick else 5)]
        calls = {"actrec": partial(recorded_in, record, model, batches, names)}
        for name, (_, way) in _installed().items():
            calls[name] = partial(way, model, batches, names)
        right = {name: exact(model, batches, call()) for name, call in calls.items()}
        assert right["actrec"], what
        variants = {name: partial(_time, call) for name, call in calls.items()}
        times = take_turns(variants, rounds=1 if quick else 3)
        for name in list(calls)[1:]:
            took = ratios(times, "actrec", name)
            target = NOT_SLOWER if right[name] else None
            who = "both" if right[name] else "actrec alone"
            yield Row.of(f"{what}: actrec / {_label(name)}", took, target, exact=who)


def _time(call: Callable[[], Recorded]) -> float:
    start = perf_counter()  # some of them work in threads of their own
    call()
    return perf_counter() - start


def _works() -> Iterator[tuple[str, nn.Module, Tensor]]:
    yield "ResNet-50 shape, 4x3x96x96", resnet(), torch.randn(4, 3, 96, 96)
    yield "GPT shape, 12 layers of 512, 4x64", GPT(), torch.randint(1000, (4, 64))
    yield "50 linear layers with ReLUs, 8x16", mlp(), torch.randn(8, 16)


def _small() -> Iterator[tuple[str, nn.Module, Tensor]]:
    yield "2 linear layers with ReLUs", mlp(2), torch.randn(8, 16)


def _installed() -> dict[str, tuple[str, Callable[..., Recorded]]]:
    def there(package: str) -> bool:
        try:
            return bool(version(package))
        except PackageNotFoundError:
            return False

    return {name: way for name, way in WAYS.items() if there(way[0])}


def _label(name: str) -> str:
    package = WAYS[name][0]
    return name if package == "torch" else f"{name} {version(package)}"


def _executed(model: nn.Module, x: Tensor) -> list[str]:
    """The leaves in the order of their first calls, which nnsight asks for."""
    order: dict[str, None] = defaultdict()
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.setdefault(name))
        for name, module in leaves(model)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return list(order)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure actrec against other libraries.")
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--markdown", action="store_true", help="print as Markdown")
    parser.add_argument(
        "--keep", action="store_true", help="keep the rows, and write the pages about speed anew"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = list(measure(quick=options.quick))
    if options.keep:
        page.keep("peers", rows)
    show = report.markdown if options.markdown else report.text
    print(show(rows, " ".join(["python tests/benchmarks/peers.py", *arguments])))


if __name__ == "__main__":
    main(sys.argv[1:])
