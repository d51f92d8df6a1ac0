"""Threads are users: whatever belongs to one call stands at one index, whoever else calls the layer meanwhile.

Trees of modules are generated. A module of them multiplies, so the values of a call can be told from each other.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actrec import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True, scope="module")
def switching_often() -> Iterator[None]:
    """Threads take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class Scale(nn.Module):
    """Multiplies by a power of two, which is exact."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


#: Modules that are used again and again, in one tree and in one pass.
SHARED = [Scale(2.0), Scale(0.5), Scale(4.0)]

trees = st.recursive(
    st.sampled_from(SHARED) | st.builds(Scale, st.sampled_from([0.25, 0.5, 1.0, 2.0])),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda items: nn.Sequential(*items)),
    max_leaves=8,
)


def in_threads(work: Callable[[int], Any], threads: int) -> None:
    """Run ``work(number)`` in several threads at once, and raise what one of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(threads)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


def replica(module: nn.Module) -> Any:
    """What DataParallel makes of a module for another GPU: it shares the hooks."""
    copy: Any = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        copy._modules[name] = replica(child)
    return copy


class Parallel(nn.Module):
    """What DataParallel does: a forward runs replicas, each in a thread of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        outputs: dict[int, Tensor] = {}
        replicas = [replica(self.module) for _ in inputs]
        in_threads(lambda n: outputs.update({n: replicas[n](inputs[n])}), len(inputs))
        return [outputs[number] for number in range(len(inputs))]


#: No product of two of them is the square of a third.
PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(trees, st.booleans(), st.booleans())
def test_the_value_the_input_the_gradient_and_the_pass_of_a_call_stand_at_one_index(
    tree: nn.Module, replicated: bool, inside: bool
) -> None:
    threads = 4
    inputs = [torch.tensor([[float(prime)]], requires_grad=True) for prime in PRIMES]
    batches = [inputs[at : at + threads] for at in range(0, len(inputs), threads)]
    model = Parallel(nn.Sequential(tree))
    outputs: list[Tensor] = []

    def call(*given: Tensor) -> None:
        results = model(*given) if replicated else [model.module(*given)]
        outputs.extend(results)
        if inside:
            for result in results:
                result.square().sum().backward()

    root = model if replicated else model.module
    names = [name for name, module in root.named_modules() if module is not model]
    with record(root, names, inputs=True, grads=True) as acts:
        if replicated:
            for batch in batches:
                call(*batch)
        else:
            in_threads(lambda number: [call(x) for x in inputs[number::threads]], threads)
    if not inside:
        in_threads(lambda n: [o.square().sum().backward() for o in outputs[n::threads]], threads)

    assert acts.num_passes == (len(batches) if replicated else len(inputs))
    whole = acts["module" if replicated else ""]
    assert len(whole) == len(inputs)
    losses: dict[int, set[float]] = {}
    for number, output in zip(whole.passes, whole, strict=True):
        losses.setdefault(number, set()).add(2 * float(output) ** 2)
    for name in names:
        assert all(belongs(call, root.get_submodule(name), losses) for call in calls_of(acts, name))


def calls_of(acts: Any, name: str) -> Iterator[tuple[Any, ...]]:
    values, inputs, grads = acts[name], acts.inputs[name], acts.grads[name]
    assert values.passes == inputs.passes == grads.passes
    return zip(values, inputs, grads, values.passes, strict=True)


def belongs(call: tuple[Any, ...], module: nn.Module, losses: dict[int, set[float]]) -> bool:
    """Whether the parts of a call are those of one."""
    value, received, grad, number = call
    made = not isinstance(module, Scale) or torch.equal(value, received["x"] * module.factor)
    # Behind the value everything multiplies, whichever layer it is: its share of the loss is the loss.
    return made and float(value * grad) in losses[number]


def test_a_call_that_is_cleared_by_another_thread_is_cleared_as_a_whole() -> None:
    model = Scale(2.0)
    done = threading.Event()

    def work(number: int) -> None:
        while number == 0 and not done.is_set():
            acts.clear()
        for prime in PRIMES * 5 if number else ():
            output = model(torch.tensor([[float(prime)]], requires_grad=True))
            output.square().sum().backward()
            if prime == PRIMES[-1]:
                done.set()

    with record(model, "", inputs=True, grads=True) as acts:
        in_threads(work, 4)
    for value, received, grad in zip(acts[""], acts.inputs[""], acts.grads[""], strict=True):
        assert torch.equal(value, received["x"] * 2)
        assert torch.equal(grad, value * 2)
