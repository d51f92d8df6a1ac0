"""Check and measure recording on a GPU: ``python tests/benchmarks/cuda.py [--quick]``.

It needs PyTorch and actrec, nothing else. First it checks that what is recorded is right, bit for bit, against
clones that a hand-written hook takes on the GPU. Then it times a transformer of 24 layers, every layer
recorded: against the forward alone, against ``.cpu()`` in hooks, and against what the link can carry.
It ends with status 1 if a value was wrong, or a target was missed. The whole takes a minute or two.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if not __package__:  # started as a file, whose folder has a name that PyTorch imports: cuda
    sys.path[0] = str(Path(__file__).parents[2])

import torch
from torch import Tensor, nn

from actrec import CaptureError, record
from actrec._calls import self_test
from tests.benchmarks import report
from tests.benchmarks.models import Block
from tests.benchmarks.timing import Row, ratios, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_GPU = "cuda.py: PyTorch sees no GPU here, so there is nothing to measure. Run it on a machine with a GPU of NVIDIA or AMD."

FORWARD = 1.07  # of the forward alone, where the link keeps up
LINK = 1 / 0.9  # of the time that the link needs, where it does not
HOOKS = 1 / 3  # of the time that .cpu() in hooks takes


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


@dataclass(frozen=True)
class Gpu:
    """What the checks need of a GPU. The test of this file runs them without one."""

    devices: list[torch.device]
    synchronize: Callable[[], None] = torch.cuda.synchronize
    new_stream: Callable[[], Any] = torch.cuda.Stream
    on_stream: Callable[[Any], Any] = torch.cuda.stream
    pinned: Callable[[int], Tensor] = _pinned
    dtype: torch.dtype = torch.bfloat16


# --- Right values ------------------------------------------------------------------------------------


class Rewriting(nn.Module):
    """Layers whose outputs are overwritten at once: in place, past the version counter, by a kernel's ``out=``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.tail = nn.Sequential(nn.Linear(width, width), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index % 3 == 0:
                x.mul_(-0.5).relu_()
            elif index % 3 == 1:
                x.data.cos_()
            else:
                torch.mm(x.clone(), layer.weight.detach(), out=x.detach())
        return self.tail(x)


@contextmanager
def clones(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The reference: clones on the GPU, taken by a hook on every layer."""
    store: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if not name or isinstance(module, nn.ModuleList):
            continue
        kept = store.setdefault(name, [])

        def hook(_module: object, _args: object, output: Tensor, kept: list[Tensor] = kept) -> None:
            kept.append(output.detach().clone())

        handles.append(module.register_forward_hook(hook))
    try:
        yield store
    finally:
        for handle in handles:
            handle.remove()


def wrong(run: Callable[[], object], model: nn.Module, **options: Any) -> int:
    """How many values differ between the reference and what actrec records at the same time."""
    with clones(model) as expected, record(model, list(expected), **options) as acts:
        run()
        seen = sum(len(layer) for layer in acts.values())
    if {*acts.transfers.values()} != {"asynchronous"}:
        return max(seen, 1)
    different = sum(
        not torch.equal(value, right.cpu())
        for name, layer in acts.items()
        for value, right in zip(layer, expected[name], strict=True)
    )
    return different + (seen == 0)


def check_self_test(gpu: Gpu, *, repetitions: int, size: int) -> bool:
    """What decides by itself, on the first value, whether copies from a device may be asynchronous."""
    tests = [
        self_test.passes_self_test(self_test.CUDA, device)
        for device in gpu.devices
        for _ in range(repetitions)
    ]
    return all(tests) and size > 0


def check_exact(gpu: Gpu, *, repetitions: int, size: int) -> bool:
    model, x = _rewriting(gpu, gpu.devices[0], size)
    with torch.no_grad():
        return not sum(wrong(lambda: model(x), model) for _ in range(repetitions))


def check_inference_mode(gpu: Gpu, *, repetitions: int, size: int) -> bool:
    model, x = _rewriting(gpu, gpu.devices[0], size)
    with torch.inference_mode():
        return not sum(wrong(lambda: model(x), model) for _ in range(repetitions))


def check_streams(gpu: Gpu, *, repetitions: int, size: int) -> bool:
    """Forwards on streams of the caller's, in turn."""
    model, x = _rewriting(gpu, gpu.devices[0], size)
    gpu.synchronize()  # x was made on another stream
    streams = [gpu.new_stream() for _ in range(3)]

    def run() -> None:
        for stream in streams:
            with gpu.on_stream(stream):
                model(x)
        gpu.synchronize()

    with torch.no_grad():
        return not sum(wrong(run, model) for _ in range(repetitions))


def check_devices(gpu: Gpu, *, repetitions: int, size: int) -> bool:
    """A model that is spread over the devices (one, if there is one)."""
    parts = [_rewriting(gpu, device, size) for device in gpu.devices]
    model = nn.ModuleList(part for part, _ in parts)

    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            for part, device in zip(self.parts, gpu.devices, strict=True):
                x = part(x.to(device))
            return x

    spread = Spread()
    with torch.no_grad():
        return not sum(wrong(lambda: spread(parts[0][1]), spread) for _ in range(repetitions))


def check_looks(gpu: Gpu, *, repetitions: int, size: int) -> bool:
    """A look in the middle of a forward finds what has been computed so far, complete."""
    model, x = _rewriting(gpu, gpu.devices[0], size)
    returned: list[Tensor] = []
    right: list[bool] = []

    def note(_module: object, _args: object, output: Tensor) -> None:
        returned.append(output.clone())

    def look(*_: object) -> None:
        right.append(torch.equal(acts["layers.1"][-1], returned[-1].cpu()))

    with (
        torch.no_grad(),
        record(model, ["layers.*", "tail"]) as acts,
        _hooked(model.layers[1], note),
        _hooked(model.layers[4], look),
    ):
        for _ in range(repetitions):
            model(x)
    return all(right) and len(right) == repetitions


def check_budget(gpu: Gpu, *, repetitions: int, size: int) -> bool:
    """What is on its way stays within the budget; what is larger than that arrives too."""
    model = nn.Sequential(*[nn.Identity() for _ in range(4)])
    on_their_way: list[int] = []
    with torch.no_grad(), record(model) as acts:
        offload = acts._session.offload
        x = torch.arange(offload._budget // 4, device=gpu.devices[0]).view(-1, 2)  # two budgets
        third = x[: len(x) // 6].clone()

        def look(*_: object) -> None:
            on_their_way.append(offload._in_flight)

        with _hooked(model[3], look):
            model(x)
            model(third)
    expected = [x.cpu(), third.cpu()]
    same = all(all(map(torch.equal, layer, expected)) for layer in acts.values())
    return same and 0 < on_their_way[1] <= offload._budget and repetitions * size > 0


def check_random(gpu: Gpu, *, repetitions: int, size: int) -> bool:
    """A transform that draws random numbers does not move the model's random stream."""
    x = torch.ones(size, size, device=gpu.devices[0])
    model = nn.Sequential(nn.Dropout(), nn.Dropout())

    def run() -> Tensor:
        torch.manual_seed(0)
        return torch.stack([model(x) for _ in range(repetitions)])

    expected = run()

    def draw(value: Tensor) -> Tensor:
        number = torch.rand((), device=value.device)
        return nn.functional.dropout(value + torch.rand_like(value)) + number

    with record(model, transform=draw) as acts:
        same = torch.equal(run(), expected)
    calls = [value.sum().item() for layer in acts.values() for value in layer]
    return same and len(set(calls)) == len(calls)


def check_graphs(gpu: Gpu, *, repetitions: int, size: int) -> bool:
    """While a CUDA graph is captured, recording is refused; the model is as it was."""
    model, x = _rewriting(gpu, gpu.devices[0], size)
    refused = 0
    with torch.no_grad():
        expected = model(x)
        for device in (None, "cpu"):
            try:
                with record(model.tail, device=device), torch.cuda.graph(torch.cuda.CUDAGraph()):
                    model.tail(x)
            except CaptureError:
                refused += 1
        gpu.synchronize()
        return refused == 2 and torch.equal(model(x), expected) and repetitions > 0


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


CHECKS = {
    "the self-test of asynchronous copies": check_self_test,
    "exact, with a write right after every layer": check_exact,
    "exact in inference mode": check_inference_mode,
    "exact on several streams": check_streams,
    "exact on all devices": check_devices,
    "complete in the middle of a forward": check_looks,
    "copies on their way within their budget": check_budget,
    "random streams untouched by transforms": check_random,
}
ON_A_GPU_ALONE = {"CUDA graphs refused": check_graphs}


def _rewriting(gpu: Gpu, device: torch.device, size: int) -> tuple[Rewriting, Tensor]:
    torch.manual_seed(0)
    model = Rewriting(size).to(device, gpu.dtype)
    return model, torch.randn(size, size, device=device, dtype=gpu.dtype)


# --- Time --------------------------------------------------------------------------------------------


def measure(gpu: Gpu, *, rounds: int, layers: int, width: int, length: int, batch: int):
    device = gpu.devices[0]
    blocks = (Block(width, heads=max(width // 64, 1)) for _ in range(layers))
    model = nn.Sequential(*blocks).to(device, gpu.dtype).eval()
    x = torch.randn(batch, length, width, device=device, dtype=gpu.dtype)
    names = [str(index) for index in range(layers)]
    hooks = {
        "unrecorded": nullcontext,
        "actrec": partial(record, model, names),
        "waiting": partial(_waiting, gpu, model, names),
        ".cpu()": partial(_cpu_hooks, model),
    }

    def forward(hooked: Callable[[], Any]) -> float:
        with torch.no_grad(), hooked():
            return _seconds(gpu, lambda: model(x))

    variants = {name: partial(forward, hooked) for name, hooked in hooks.items()}
    variants["link"] = partial(_link, gpu, x, layers)
    times = take_turns(variants, rounds)
    what = f"{layers} layers of {width}, {batch}x{length}, {layers * x.nbytes / 1e9:.2f} GB"
    keeps_up = Row.of("", ratios(times, "link", "unrecorded")).median <= 1
    alone, link = ratios(times, "actrec", "unrecorded"), ratios(times, "actrec", "link")
    yield Row.of(f"time: actrec / unrecorded, {what}", alone, FORWARD if keeps_up else None)
    yield Row.of(f"time: actrec / pinned copies, {what}", link, None if keeps_up else LINK)
    yield Row.of(f"time: actrec / .cpu() hooks, {what}", ratios(times, "actrec", ".cpu()"), HOOKS)
    waiting = ratios(times, "waiting", ".cpu()")
    yield Row.of(f"time: actrec, copies not asynchronous / .cpu() hooks, {what}", waiting)
    yield Row.of(f"time: .cpu() hooks / unrecorded, {what}", ratios(times, ".cpu()", "unrecorded"))
    speeds = [layers * x.nbytes / seconds / 1e9 for seconds in times["link"]]
    yield Row.of("pinned copies alone", speeds, unit="GB/s")
    speeds = [layers * x.nbytes / seconds / 1e9 for seconds in times["actrec"]]
    yield Row.of("actrec", speeds, unit="GB/s")


@contextmanager
def _waiting(gpu: Gpu, model: nn.Module, names: list[str]) -> Iterator[None]:
    """actrec where the self-test has failed."""
    distrusted = dict.fromkeys(gpu.devices, False)
    with patch.dict(self_test.CUDA.tested, distrusted), record(model, names):
        yield


@contextmanager
def _cpu_hooks(model: nn.Sequential) -> Iterator[list[Tensor]]:
    """The classic hook, on the recorded layers alone."""
    store: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, output: store.append(output.detach().cpu()))
        for layer in model
    ]
    yield store
    for handle in handles:
        handle.remove()


def _link(gpu: Gpu, x: Tensor, times: int) -> float:
    """Seconds for the bytes of all layers, copied into one pinned buffer, one behind the other."""
    buffer = gpu.pinned(x.nbytes)
    source = x.view(torch.uint8).flatten()

    def copies() -> None:
        for _ in range(times):
            buffer.copy_(source, non_blocking=True)

    return _seconds(gpu, copies)


def _seconds(gpu: Gpu, work: Callable[[], object]) -> float:
    gpu.synchronize()
    start = perf_counter()
    work()
    gpu.synchronize()
    return perf_counter() - start


# --- The command -------------------------------------------------------------------------------------

SIZES = {"rounds": 11, "layers": 24, "width": 1024, "length": 1024, "batch": 32}
QUICK = {"rounds": 2, "layers": 3, "width": 64, "length": 32, "batch": 2}


def main(arguments: list[str], gpu: Gpu | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and measure recording on a GPU.")
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--markdown", action="store_true", help="print for the documentation")
    options = parser.parse_args(arguments)
    if gpu is None:
        if not torch.cuda.is_available():
            print(NO_GPU, file=sys.stderr)
            return 2
        gpu = Gpu([torch.device("cuda", index) for index in range(torch.cuda.device_count())])
    checks = CHECKS if gpu.devices[0].type == "cpu" else {**CHECKS, **ON_A_GPU_ALONE}
    repetitions, size = (2, 16) if options.quick else (100, 1024)
    failed = 0
    for name, check in checks.items():
        passed = check(gpu, repetitions=repetitions, size=size)
        failed += not passed
        print(f"{'ok   ' if passed else 'WRONG'}  {name}", flush=True)
    rows = list(measure(gpu, **(QUICK if options.quick else SIZES)))
    show = report.markdown if options.markdown else report.text
    print(f"\n{_card(gpu)}")
    print(show(rows, " ".join(["python tests/benchmarks/cuda.py", *arguments])))
    missed = any(row.met is False for row in rows) and not options.quick
    return 1 if failed or missed else 0


def _card(gpu: Gpu) -> str:
    device = gpu.devices[0]
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
