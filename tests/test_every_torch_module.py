"""Every module of ``torch.nn`` is recorded exactly, and computes what it would have computed unrecorded.

The modules and their inputs come from PyTorch's own database, the one its module tests run on. Modules
that are missing there have samples below, and a test holds the two together against
``torch.nn.modules.__all__``, so that a module that PyTorch adds is noticed.

The ordinary tests have the samples below; ``nox -s sweeps`` has the database, and both dtypes.

Nothing here trusts actrec: references are clones made by plain hooks in the same forward, compared bit
by bit, so that NaN equals NaN and 0.0 differs from -0.0.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from actrec import SelectionError, UnusedLayerWarning, record

from .sweep import WHOLE, only_in_sweeps, some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.hooks import RemovableHandle

pytestmark = [
    pytest.mark.sweep,
    # Said when a TransformerEncoder is built whose layers cannot use nested tensors: many samples.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    # The default reduction of KLDivLoss is one that its own documentation advises against.
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    # Samples that give options to a LinearCrossEntropyLoss that has no use for them.
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning"),
    # An LSTM with proj_size says once in a process that it takes the general implementation.
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning"),
    # PyTorch's prototype of nested tensors, which the fast path of TransformerEncoder makes of padding.
    pytest.mark.filterwarnings(
        "ignore:The PyTorch API of nested tensors is in prototype:UserWarning"
    ),
    # Lazy modules say on construction that they are in development.
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning"),
]

DTYPES = some((torch.float32, torch.float64), 1)

DATABASE: dict[str, Any] = {}
if WHOLE:  # it takes the time of importing PyTorch twice
    from torch.testing._internal.common_modules import module_db

    DATABASE |= {info.formatted_name.removeprefix("nn_"): info for info in module_db}


#: Of one module, in one dtype and mode.
MOST_SAMPLES = 20


class Sample(NamedTuple):
    """One way to make a module and to call it."""

    label: str
    make: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# --- Samples ---------------------------------------------------------------------------------------

Row = tuple[Callable[[], nn.Module], Callable[[torch.dtype], tuple[Any, ...]]]


def _random(*shape: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    return lambda dtype: (torch.randn(shape, dtype=dtype, requires_grad=True),)


def _computed(*shape: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    """Input without gradient, which a module may overwrite."""
    return lambda dtype: (torch.randn(shape, dtype=dtype),)


def _several(count: int, *shape: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    return lambda dtype: tuple(
        torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)
    )


def _and_classes(*shape: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    return lambda dtype: (
        torch.randn(shape, dtype=dtype, requires_grad=True),
        torch.tensor([0, 3, 5, 1]),
    )


def _pooled(pool: Callable[..., Any], *shape: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    """What a max pool returns with its indices, which is what unpooling takes."""
    return lambda dtype: pool(
        torch.randn(shape, dtype=dtype, requires_grad=True), 2, return_indices=True
    )


def _packed(dtype: torch.dtype) -> tuple[Any, ...]:
    return (pack_sequence([torch.randn(length, 4, dtype=dtype) for length in (5, 3, 2)]),)


def _in_place_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.5))


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2)


#: Modules that the database lacks, and those ways to use one of its modules that it leaves out.
OWN: dict[str, list[Row]] = {
    "AdaptiveLogSoftmaxWithLoss": [
        (partial(nn.AdaptiveLogSoftmaxWithLoss, 8, 6, cutoffs=[2]), _and_classes(4, 8))
    ],
    "AlphaDropout": [
        (nn.AlphaDropout, _random(4, 6)),
        (partial(nn.AlphaDropout, inplace=True), _computed(4, 6)),
    ],
    "ChannelShuffle": [(partial(nn.ChannelShuffle, 2), _random(2, 4, 3, 3))],
    "CosineSimilarity": [(nn.CosineSimilarity, _several(2, 4, 6))],
    "CrossMapLRN2d": [(partial(nn.CrossMapLRN2d, 3), _random(2, 4, 5, 5))],
    "Dropout": [(nn.Dropout, _random(4, 6)), (partial(nn.Dropout, inplace=True), _computed(4, 6))],
    "Dropout1d": [
        (nn.Dropout1d, _random(2, 4, 6)),
        (partial(nn.Dropout1d, inplace=True), _computed(2, 4, 6)),
    ],
    "Dropout2d": [
        (nn.Dropout2d, _random(2, 4, 3, 3)),
        (partial(nn.Dropout2d, inplace=True), _computed(2, 4, 3, 3)),
    ],
    "Dropout3d": [(nn.Dropout3d, _random(2, 4, 3, 3, 3))],
    "ELU": [(partial(nn.ELU, inplace=True), _computed(4, 6))],
    "EmbeddingBag": [
        (
            partial(nn.EmbeddingBag, 6, 4, mode=mode),
            lambda _: (torch.tensor([[0, 1, 5], [2, 2, 3]]),),
        )
        for mode in ("sum", "mean", "max")
    ],
    "Embedding": [
        (
            partial(nn.Embedding, 6, 4, max_norm=0.5),
            lambda _: (torch.tensor([[0, 1, 5], [2, 2, 3]]),),
        )
    ],
    "FeatureAlphaDropout": [(nn.FeatureAlphaDropout, _random(2, 4, 3, 3))],
    "Flatten": [(nn.Flatten, _random(2, 4, 3)), (nn.Flatten, _random(2, 4))],
    "Fold": [(partial(nn.Fold, (4, 5), (2, 2)), _random(1, 8, 12))],
    "Hardsigmoid": [
        (nn.Hardsigmoid, _random(4, 6)),
        (partial(nn.Hardsigmoid, inplace=True), _computed(4, 6)),
    ],
    "Hardswish": [(partial(nn.Hardswish, inplace=True), _computed(4, 6))],
    "Identity": [(nn.Identity, _random(4, 6)), (nn.Identity, _computed(4, 6))],
    "LSTM": [(partial(nn.LSTM, 4, 3, 2), _packed)],
    "GRU": [(partial(nn.GRU, 4, 3, bidirectional=True), _packed)],
    "LazyBatchNorm1d": [(nn.LazyBatchNorm1d, _random(4, 6))],
    "LazyBatchNorm2d": [(nn.LazyBatchNorm2d, _random(2, 4, 3, 3))],
    "LazyBatchNorm3d": [(nn.LazyBatchNorm3d, _random(2, 4, 3, 3, 3))],
    "LazyInstanceNorm1d": [(partial(nn.LazyInstanceNorm1d, affine=True), _random(2, 4, 6))],
    "LazyInstanceNorm2d": [(partial(nn.LazyInstanceNorm2d, affine=True), _random(2, 4, 3, 3))],
    "LazyInstanceNorm3d": [(partial(nn.LazyInstanceNorm3d, affine=True), _random(2, 4, 3, 3, 3))],
    "LazyLinear": [(partial(nn.LazyLinear, 3), _random(4, 6))],
    "MaxUnpool1d": [(partial(nn.MaxUnpool1d, 2), _pooled(nn.functional.max_pool1d, 2, 4, 8))],
    "MaxUnpool2d": [(partial(nn.MaxUnpool2d, 2), _pooled(nn.functional.max_pool2d, 2, 4, 8, 8))],
    "MaxUnpool3d": [(partial(nn.MaxUnpool3d, 2), _pooled(nn.functional.max_pool3d, 1, 2, 4, 4, 4))],
    "MaxPool2d": [(partial(nn.MaxPool2d, 2, return_indices=True), _random(2, 4, 6, 6))],
    "PairwiseDistance": [(nn.PairwiseDistance, _several(2, 4, 6))],
    "PixelShuffle": [(partial(nn.PixelShuffle, 2), _random(1, 8, 3, 3))],
    "PixelUnshuffle": [(partial(nn.PixelUnshuffle, 2), _random(1, 2, 6, 6))],
    "RReLU": [(nn.RReLU, _random(4, 6)), (partial(nn.RReLU, inplace=True), _computed(4, 6))],
    "ReLU": [(partial(nn.ReLU, inplace=True), _computed(4, 6))],
    "Sequential": [
        (nn.Sequential, _random(4, 6)),
        (_in_place_net, _random(3, 4)),
    ],
    "SiLU": [(partial(nn.SiLU, inplace=True), _computed(4, 6))],
    "SyncBatchNorm": [(lambda: nn.SyncBatchNorm(4).eval(), _random(2, 4, 3, 3))],
    "Threshold": [(partial(nn.Threshold, 0.1, 20.0, inplace=True), _computed(4, 6))],
    "TransformerDecoder": [(_decoder, _several(2, 5, 3, 8))],
    "TripletMarginLoss": [(nn.TripletMarginLoss, _several(3, 4, 6))],
    "TripletMarginWithDistanceLoss": [(nn.TripletMarginWithDistanceLoss, _several(3, 4, 6))],
    "Unflatten": [(partial(nn.Unflatten, 1, (2, 3)), _random(4, 6))],
    "Unfold": [(partial(nn.Unfold, 2), _random(1, 2, 5, 5))],
    "Upsample": [(partial(nn.Upsample, scale_factor=2), _random(1, 2, 3, 3))],
    "UpsamplingBilinear2d": [
        (partial(nn.UpsamplingBilinear2d, scale_factor=2), _random(1, 2, 3, 3))
    ],
    "UpsamplingNearest2d": [(partial(nn.UpsamplingNearest2d, scale_factor=2), _random(1, 2, 3, 3))],
}

#: Containers that are never called: there is nothing to record, and actrec says so.
CONTAINERS: dict[str, Callable[[], nn.Module]] = {
    "ModuleList": lambda: nn.ModuleList([nn.Linear(2, 2)]),
    "ModuleDict": lambda: nn.ModuleDict({"a": nn.Linear(2, 2)}),
    "ParameterList": lambda: nn.ParameterList([torch.zeros(2)]),
    "ParameterDict": lambda: nn.ParameterDict({"a": torch.zeros(2)}),
}

#: What else ``torch.nn.modules`` exports, and why there is nothing to call.
NOT_CALLABLE = {
    "Module": "the base class, without a forward",
    "RNNBase": "a base class, without a forward of its own kind",
    "RNNCellBase": "a base class, without a forward",
    "Container": "deprecated, a base class without a forward",
    "NLLLoss2d": "deprecated, its constructor warns; the same as NLLLoss",
    "LinearCrossEntropyOptions": "a bundle of options, no module",
}

NAMES = sorted({*DATABASE, *OWN})


def samples(name: str, *, training: bool) -> Iterator[Sample]:
    """Every sample of one module, in both dtypes."""
    for dtype in DTYPES:
        where = f"{name}, {dtype}, {'train' if training else 'eval'}"
        if name in DATABASE:
            yield from _from_database(DATABASE[name], dtype, where, training=training)
        for make, arguments in OWN.get(name, ()):
            make_ready = partial(_ready, make, dtype, training=training and name != "SyncBatchNorm")
            yield Sample(f"{where}, own sample", make_ready, arguments(dtype), {})


def _from_database(
    info: Any, dtype: torch.dtype, where: str, *, training: bool
) -> Iterator[Sample]:
    options: dict[str, Any] = {
        "device": "cpu",
        "dtype": dtype,
        "requires_grad": True,
        "training": training,
    }
    for number, found in enumerate(spread(info.module_inputs_func(info, **options))):
        make = partial(
            info.module_cls, *found.constructor_input.args, **found.constructor_input.kwargs
        )
        label = f"{where}, sample {number} {found.desc}"
        ready = partial(_ready, make, dtype, training=training)
        yield Sample(label, ready, found.forward_input.args, found.forward_input.kwargs)


def spread(found: list[Any]) -> list[Any]:
    """All of them, or if there are very many, some from every part of the list.

    Losses and transformers have so many, the product of all their options: up to 456.
    """
    return found[:: -(-len(found) // MOST_SAMPLES)]


def _ready(make: Callable[[], nn.Module], dtype: torch.dtype, *, training: bool) -> nn.Module:
    torch.manual_seed(1)
    return make().to(dtype).train(training)


# --- Trusted references ----------------------------------------------------------------------------


def cloned(value: Any) -> Any:
    """Clone every tensor in nested tuples, lists and dicts."""
    match value:
        case Tensor():
            return value.detach().clone().requires_grad_(value.requires_grad)
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*map(cloned, value))
        case tuple() | list():
            return type(value)(map(cloned, value))
        case dict():
            return {key: cloned(item) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and dicts."""
    match value:
        case Tensor():
            yield value
        case tuple() | list():
            for item in value:
                yield from tensors_in(item)
        case dict():
            yield from tensors_in(list(value.values()))


def bits(tensor: Tensor) -> Tensor:
    """The bytes of the elements: NaN is equal to itself, and 0.0 differs from -0.0."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def assert_same(actual: Any, expected: Any) -> None:
    """Same structure, same types, same shapes and dtypes, same bits."""
    assert type(actual) is type(expected)
    match expected:
        case Tensor():
            assert (actual.dtype, actual.device) == (expected.dtype, expected.device)
            assert actual.is_nested == expected.is_nested
            if expected.is_nested:
                assert_same(list(actual.unbind()), list(expected.unbind()))
            else:
                assert actual.shape == expected.shape
                assert torch.equal(bits(actual), bits(expected))
        case tuple() | list():
            assert len(actual) == len(expected)
            for mine, theirs in zip(actual, expected, strict=True):
                assert_same(mine, theirs)
        case dict():
            assert list(actual) == list(expected)
            assert_same(list(actual.values()), list(expected.values()))
        case _:
            assert actual == expected


def overwrite(value: Any, byte: int) -> None:
    """Write, in place, to all the memory behind the tensors of ``value``; 0 and 1 suit bools too."""
    for tensor in tensors_in(value):
        torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).fill_(byte)


class Called(NamedTuple):
    """What a call did, as far as anybody can see."""

    output: Any
    random_state: Tensor
    buffers: list[Tensor]


def called(module: nn.Module, args: Any, kwargs: Any) -> Called:
    """Call a module from a fixed random state."""
    torch.manual_seed(2)
    output = module(*args, **kwargs)
    return Called(output, torch.get_rng_state(), list(module.buffers()))


def gradients(module: nn.Module, output: Any, given: Any) -> list[Tensor | None]:
    """What ``backward()`` of the sum of all outputs leaves in the parameters and in what was given."""
    losses = [tensor.sum() for tensor in tensors_in(output) if tensor.requires_grad]
    if losses:
        torch.stack([loss.to(torch.float64) for loss in losses]).sum().backward()
    return [tensor.grad for tensor in (*module.parameters(), *tensors_in(given)) if tensor.is_leaf]


def hooks_of(module: nn.Module) -> list[object]:
    """All forward hooks, of the module and of those inside."""
    tables = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
    )
    return [
        hook
        for child in module.modules()
        for table in tables
        for hook in vars(child)[table].values()
    ]


@contextmanager
def named(sample: Sample) -> Iterator[None]:
    """Say which sample it was that failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"with {sample.label}: {sample.make()}")
        raise


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Let sums be added up in one order: only then does PyTorch itself give the same bits twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The promises ----------------------------------------------------------------------------------

MODES = {
    "train": (True, nullcontext),
    "eval": (False, nullcontext),
    "eval, no_grad": (False, torch.no_grad),  # where PyTorch may take its fast paths
    "eval, inference_mode": (False, torch.inference_mode),
}


def modes_and_samples(name: str) -> Iterator[tuple[AbstractContextManager[Any], Sample]]:
    """Every sample of a module in every mode."""
    for label, (training, mode) in MODES.items():
        for sample in samples(name, training=training):
            yield mode(), sample._replace(label=f"{sample.label}, {label}")


def check_itself(sample: Sample, mode: AbstractContextManager[Any]) -> int:
    """Compare a recorded call with one that is not; return how many gradients there were."""
    module, twin = sample.make(), sample.make()
    given, given_twin = cloned((sample.args, sample.kwargs)), cloned((sample.args, sample.kwargs))
    trusted: list[Any] = []
    with mode:
        expected = called(twin, *given_twin)
        handle = module.register_forward_hook(lambda *call: trusted.append(cloned(call[-1])))
        with record(module, "") as acts:
            actual = called(module, *given)
    handle.remove()

    assert not hooks_of(module)
    assert_same(actual, expected)
    assert_same(list(acts[""]), trusted)
    expected_gradients = gradients(twin, expected.output, given_twin)
    assert_same(gradients(module, actual.output, given), expected_gradients)
    around = [
        actual.output,
        given,
        [tensor.detach() for tensor in (*module.parameters(), *module.buffers())],
    ]
    check_independent(acts[""][0], trusted[0], around)
    return sum(gradient is not None for gradient in expected_gradients)


def check_independent(kept: Any, trusted: Any, around: Any) -> None:
    """Write to whatever a record might share memory with, and then to the record."""
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors_in(kept))
    overwrite(around, 1)
    assert_same(kept, trusted)
    before = cloned(around)
    overwrite(kept, 0)
    assert_same(around, before)


@pytest.mark.parametrize("name", NAMES)
def test_the_record_is_what_the_module_returned_and_the_module_feels_nothing(name: str) -> None:
    compared = 0
    for mode, sample in modes_and_samples(name):
        with named(sample):
            compared += check_itself(sample, mode)
    assert compared or not WHOLE, "of every module there is a sample with gradients"


def bound(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """What Python would bind the arguments of a call to."""
    parameters = inspect.signature(module.forward).parameters.values()
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


class Reference:
    """What plain hooks saw of every call: clones of what came in and of what came out."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.inputs: dict[str, list[Any]] = {name: [] for name in modules}
        self.outputs: dict[str, list[Any]] = {name: [] for name in modules}
        self._handles = [
            handle for name, module in modules.items() for handle in self._watch(name, module)
        ]

    def _watch(self, name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.inputs[name].append(cloned(bound(module, args, kwargs)))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self.outputs[name].append(cloned(output))

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def warned_of(reference: Reference, leaves: dict[str, nn.Module]) -> Iterator[None]:
    """Expect the warning about layers without a call, if and only if there are any, and for those."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnusedLayerWarning)
        yield
    # What nobody chose and has no weights is not warned of.
    unused = [
        name
        for name, calls in reference.outputs.items()
        if not calls and any(True for _ in leaves[name].parameters())
    ]
    text = "".join(str(warning.message) for warning in caught)
    assert {warning.category for warning in caught} == (
        {UnusedLayerWarning} if unused else set()
    ), text
    assert all(repr(name) in text for name in unused[:8])


def by_name(inputs: Any) -> dict[str, list[dict[str, Any]]]:
    """What the calls received, in the order of the names."""
    return {name: [dict(sorted(one.items())) for one in calls] for name, calls in inputs.items()}


def check_leaves(sample: Sample, mode: AbstractContextManager[Any]) -> int:
    """Record every leaf, with its inputs; return how many calls were compared."""
    module, twin = sample.make(), sample.make()
    given, given_twin = cloned((sample.args, sample.kwargs)), cloned((sample.args, sample.kwargs))
    # An attention uses the weights of the module inside without calling it: it is recorded itself.
    whole = {name for name, one in module.named_modules() if type(one) is nn.MultiheadAttention}
    leaves = {
        name: leaf
        for name, leaf in module.named_modules()
        if name in whole or not (list(leaf.children()) or name.rpartition(".")[0] in whole)
    }
    with mode:
        expected = called(twin, *given_twin)
        reference = Reference(leaves)
        with warned_of(reference, leaves), record(module, None, inputs=True) as acts:
            actual = called(module, *given)
        reference.remove()

    assert not hooks_of(module)
    assert_same(actual, expected)
    assert_same({name: list(layer) for name, layer in acts.items()}, reference.outputs)
    assert_same(by_name(acts.inputs), by_name(reference.inputs))
    return sum(map(len, acts.values()))


#: They use the weights of the modules inside without calling them, which the exit warns of.
CALLS_NO_LEAF = {"LinearCrossEntropyLoss"}


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_is_recorded_call_by_call_with_what_it_received(name: str) -> None:
    for mode, sample in modes_and_samples(name):
        with named(sample):
            assert check_leaves(sample, mode) or not sample.make()._modules or name in CALLS_NO_LEAF


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_that_is_never_called_cannot_be_recorded(name: str) -> None:
    container = CONTAINERS[name]()
    with pytest.raises(SelectionError, match=f"is a {name}, a container that is never called"):
        record(container, "")
    with pytest.raises(SelectionError, match=f"is a {name}, a container that is never called"):
        record(nn.Sequential(container), "0")
    assert not hooks_of(container)


@only_in_sweeps
def test_the_sweep_leaves_out_no_module_of_torch() -> None:
    assert {*NAMES, *CONTAINERS, *NOT_CALLABLE} == set(nn.modules.__all__)
    assert not set(NAMES) & {*CONTAINERS, *NOT_CALLABLE}
