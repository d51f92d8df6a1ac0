"""What a transform or a container does, the model does not feel, and none of it is taken for the model's own."""

from __future__ import annotations

import copy
import heapq
import pickle
import random
import re
import sys
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actrec import (
    OptionError,
    TransformError,
    UnusedLayerWarning,
    record,
)
from actrec._calls import draws as _draws

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

X = torch.ones(2, 4)

# --- Random numbers ----------------------------------------------------------------------------------

LSTM = nn.LSTM(4, 64, num_layers=2, dropout=0.5)

DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "randperm": lambda t: torch.randperm(t.numel() * 8),
    "rand": lambda _: torch.rand(3),
    "rand, out": lambda t: torch.rand(3, out=t.new_empty(3)),
    "rand, with a device": lambda _: torch.rand(3, device="cpu"),
    "randn": lambda _: torch.randn(3),
    "randint": lambda _: torch.randint(10**9, (3,)),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda t: torch.randint_like(t, 10**6),
    "normal": lambda t: torch.normal(t, t.abs() + 1),
    "normal, sized": lambda _: torch.normal(0.0, 1.0, (3,)),
    "bernoulli": lambda t: torch.bernoulli(torch.full_like(t, 0.5).expand(50, *t.shape)),
    "multinomial": lambda _: torch.multinomial(torch.ones(1000), 3),
    "poisson": lambda t: torch.poisson(torch.full_like(t, 1000)),
    "uniform_": lambda t: t.uniform_(),
    "exponential_": lambda t: t.exponential_(),
    "the global generator": lambda _: torch.rand(3, generator=torch.default_generator),
    "the global generator, by position": lambda t: torch.poisson(t + 999, torch.default_generator),  # type: ignore[call-overload]
    "dropout": lambda t: F.dropout(t.new_ones(64), 0.5),
    "nn.Dropout": lambda t: nn.Dropout()(t.new_ones(64)),
    "gumbel_softmax": F.gumbel_softmax,
    "attention": lambda t: F.scaled_dot_product_attention(
        *[t.new_ones(1, 1, 9, 4)] * 2, torch.eye(9, 4)[None, None], dropout_p=0.5
    ),
    "lstm": lambda t: LSTM(t)[0].detach(),
    "init": lambda t: nn.init.normal_(t.new_empty(3)),
    "kaiming": lambda t: nn.init.kaiming_uniform_(t.new_empty(3, 3)),
    "distributions": lambda _: torch.distributions.Gamma(2.0, 3.0).sample(),
    "of a subclass": lambda t: torch.rand_like(t.as_subclass(Special)).as_subclass(Tensor),
}


class Special(Tensor):
    """A tensor of another type."""


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_transform_draws_other_numbers_in_each_call_and_none_of_the_models(
    draw: Callable[[Tensor], Any],
) -> None:
    net = nn.Sequential(nn.Identity(), nn.Identity())
    before = torch.get_rng_state()
    drawn: list[Tensor] = []
    for _ in range(2):  # a block for each batch is common
        with torch.no_grad(), record(net, transform=draw) as acts:
            for _ in range(2):
                net(X)
        drawn += [*acts["0"], *acts["1"]]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({pickle.dumps(value.tolist()) for value in drawn}) == 8


def test_what_a_transform_draws_follows_from_the_seed_and_is_not_what_the_model_draws() -> None:
    net = nn.Identity()

    def drawn(seed: int) -> list[float]:
        torch.manual_seed(seed)
        with record(net, "", transform=lambda _: torch.rand(())) as acts:
            for _ in range(3):
                net(X)
        return [float(value) for value in acts[""]]

    first = drawn(4)
    assert drawn(5) != first
    assert drawn(4) == first
    torch.manual_seed(4)
    assert first != torch.rand(3).tolist()


def test_every_function_of_pytorch_that_draws_is_known() -> None:
    spaces = (torch, Tensor, F, torch._C._VariableFunctions)
    drawing = {
        name
        for name in dir(torch.ops.aten)
        for overload in getattr(getattr(torch.ops.aten, name), "overloads", list)()
        if torch.Tag.nondeterministic_seeded
        in getattr(getattr(torch.ops.aten, name), overload).tags
        and any(hasattr(space, name) for space in spaces)
    }
    private = {name for name in drawing if name.startswith("_") and name != "_standard_gamma"}
    assert not drawing - private - _draws._DRAWING - {"miopen_rnn"}


def test_a_generator_of_the_users_own_is_used() -> None:
    own = torch.Generator().manual_seed(7)
    net = nn.Identity()
    with record(net, "", transform=lambda _: torch.rand(3, generator=own)) as acts:
        net(X)
    assert torch.equal(acts[""][0], torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_what_is_seeded_inside_a_fork_is_drawn_and_a_seed_that_stays_is_an_error() -> None:
    net = nn.Identity()

    def forked(_: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return torch.rand(3)

    def seeded(_: Tensor) -> Tensor:
        torch.manual_seed(8)
        return torch.rand(3)

    with record(net, "", transform=forked) as acts:
        net(X)
        net(X)
    assert torch.equal(
        acts[""].stack(), torch.rand(3, generator=torch.Generator().manual_seed(7)).expand(2, 3)
    )
    with (
        pytest.raises(
            TransformError, match=r"was seeded while it ran; let it draw from a torch.Generator"
        ),
        record(net, "", transform=seeded),
    ):
        net(X)


def test_nothing_is_drawn_on_a_device_without_numbers() -> None:
    net = nn.Identity()
    with record(
        net, "", device=None, transform=lambda t: F.dropout(torch.rand_like(t), training=False)
    ) as acts:
        net(torch.empty(2, 2, device="meta"))
    assert acts[""][0].is_meta


class Drawing(nn.Module):
    """Draws from the global stream, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(torch.rand((), dtype=torch.float64).item())
        return x


@pytest.mark.parametrize("user", ["transform", "container"])
@pytest.mark.parametrize(
    "draw",
    [torch.sum, lambda _: torch.randperm(50), torch.rand_like],
    ids=["none", "randperm", "rand"],
)
def test_threads_draw_each_number_of_the_stream_once(
    draw: Callable[[Tensor], Any], user: str
) -> None:
    class Container(list[Any]):
        def append(self, value: Tensor) -> None:
            super().append(draw(value))

    net = nn.Sequential(nn.Identity(), Drawing())
    options: dict[str, Any] = {"transform": draw} if user == "transform" else {"into": Container}

    def work() -> None:
        for _ in range(25):
            net(X)

    torch.manual_seed(3)
    expected = torch.stack([torch.rand((), dtype=torch.float64) for _ in range(100)])
    torch.manual_seed(3)
    with record(net, "0", **options) as acts:
        _in_threads([work] * 4)
    assert len(acts["0"]) == 100
    assert sorted(net[1].drawn) == expected.sort().values.tolist()  # type: ignore[arg-type]


def _in_threads(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


# --- What is called in there -------------------------------------------------------------------------


def _tree(shape: Any) -> nn.Module:
    return nn.Sequential(*map(_tree, shape)) if isinstance(shape, list) else nn.Identity()


TREES = st.recursive(
    st.just(0), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=6
)


@settings(max_examples=30, deadline=None)
@given(st.lists(TREES, min_size=1, max_size=3), st.data())
def test_calls_of_the_model_by_a_transform_or_a_container_are_not_its_own(
    shape: list[Any], data: st.DataObject
) -> None:
    net = _tree(shape)
    modules = dict(net.named_modules())
    calls = {name: data.draw(st.sampled_from([*modules.values()])) for name in modules}
    inputs, threads = data.draw(st.booleans()), data.draw(st.sampled_from([1, 3]))

    class Container(list[Any]):
        def append(self, value: Tensor) -> None:
            data_module(value)
            super().append(value)

    data_module = data.draw(st.sampled_from([*modules.values()]))
    transforms = {name: lambda t, m=module: m(t) + 1 for name, module in calls.items()}

    def work() -> None:
        net(X)
        net(X)

    with (
        record(net, [*modules], inputs=True) as around,
        record(net, transforms, inputs=inputs, into=Container) as acts,
    ):
        _in_threads([work] * threads)
    for recording in (around, acts):
        assert recording.num_passes == 2 * threads
        for layer in recording.values():
            assert sorted(layer.passes) == [*range(2 * threads)]
    assert all(torch.equal(value, X + 1) for layer in acts.values() for value in layer)
    assert all(torch.equal(value, X) for layer in around.values() for value in layer)


def test_a_transform_of_a_gradient_may_call_the_model() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with record(net, {"0": lambda t: net[1](t + 1), "1": None}, grads=True) as acts:
        net(X).sum().backward()
    assert [len(acts[name]) for name in acts] == [len(acts.grads[name]) for name in acts] == [1, 1]


def test_a_transform_that_calls_the_model_does_not_end_the_forward_early() -> None:
    net = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    with record(net, {"1": lambda t: net(t) * 2, "0": None}, stop_early=True) as acts:
        assert net(X) is None
    assert torch.equal(acts["1"][0], X * 2)
    assert len(acts["0"]) == 1


def test_a_block_inside_a_transform_records() -> None:
    net, probe = nn.Sequential(nn.Identity(), nn.Identity()), nn.Sequential(nn.Identity())
    found = []

    def probed(value: Tensor) -> Tensor:
        with record(probe, transform=torch.neg) as inner, record(net, "1") as again:
            probe(value)
            net[1](value)
        found.append((len(inner["0"]), len(again["1"])))
        return value

    with record(net, {"0": probed, "1": None}) as acts:
        net(X)
    assert found == [(1, 1)]
    assert len(acts["1"]) == 1


def test_a_container_may_look_at_its_layer_and_call_it() -> None:
    seen: list[Any] = []

    class Looks(list[Any]):
        def append(self, value: Any) -> None:
            super().append(value)
            net(X)
            seen.append((len(acts[""]), acts[""].passes, repr(acts), acts.stats(), acts.nbytes))

    net = nn.Linear(4, 4)
    with record(net, "", into=Looks, inputs=True) as acts:
        _in_threads([lambda: net(X)] * 2)
    assert max(calls for calls, *_ in seen) == 2
    assert len(acts[""]) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_container_computes_as_it_would_outside_of_the_model(mode: Callable[[], Any]) -> None:
    class Squares(list[Any]):
        def append(self, value: Tensor) -> None:
            super().append(value.T @ value)

    net = nn.Linear(4, 4)
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16), record(net, "", into=Squares) as acts:
        net(X)
        with torch.autocast("cpu", enabled=False):
            net(X)
    assert [value.dtype for value in acts[""]] == [torch.bfloat16, torch.float32]
    weight = torch.zeros(4, 4, requires_grad=True)
    (acts[""][1] * weight).sum().backward()
    assert not acts[""][1].requires_grad


def test_a_dict_of_modules_for_the_layers_is_refused_and_what_was_meant_is_said() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    meant = re.escape("record(model, list(modules.values()))")
    for layers in (dict(net.named_children()), {"0": net[1]}, {nn.Linear: net[0]}, {"0": net}):
        with pytest.raises(OptionError, match=meant):
            record(net, layers)
    pool = nn.AdaptiveAvgPool1d(1)  # no module of the model's
    with record(net, {"0": pool}) as acts:
        net(X)
    assert acts["0"][0].shape == (2, 1)


def test_after_an_error_of_a_transform_that_was_caught_the_warning_names_it() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def refuse(_: Tensor) -> Tensor:
        message = "no\nthanks"
        raise ValueError(message)

    with (
        pytest.warns(
            UnusedLayerWarning,
            match=r"'0': .*caught \(TransformError: the transform of layer '0' raised",
        ),
        record(net, {"0": refuse}),
    ):
        for _ in range(2):
            with pytest.raises(TransformError):
                net(X)


# --- The passes of what a container keeps --------------------------------------------------------------


RANDOM = random.Random()  # noqa: S311  # for a sample, not for a secret


class First(list[Any]):
    """Keeps the first three."""

    def append(self, value: Any) -> None:
        if len(self) < 3:
            super().append(value)


class EveryThird(list[Any]):
    """Keeps some, in the order of their coming."""

    calls = 0

    def append(self, value: Any) -> None:
        self.calls += 1
        if self.calls % 3 == 0:
            super().append(value)


class Sample(list[Any]):
    """Keeps a random sample of three."""

    calls = 0

    def append(self, value: Any) -> None:
        self.calls += 1
        at = RANDOM.randrange(self.calls)
        if len(self) < 3:
            super().append(value)
        elif at < 3:
            self[at] = value


class Largest(list[Any]):
    """Keeps the three of the largest scores, as a heap."""

    calls = 0

    def append(self, value: Any) -> None:
        self.calls += 1
        item = (RANDOM.random(), self.calls, value)
        (heapq.heappush if len(self) < 3 else heapq.heappushpop)(self, item)


class Newest(deque[Any]):
    """The newest is the first."""

    def append(self, value: Any) -> None:
        self.appendleft(value)


class Wrapped:
    """Keeps a sample in a container of its own, and is no list."""

    def __init__(self) -> None:
        self.items = Sample()

    def append(self, value: Any) -> None:
        self.items.append(value)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class FirstMeans(First):
    """Keeps what it computes of the first three."""

    def append(self, value: Any) -> None:
        super().append(_number(value) if self.as_number else value[0] * 1)

    as_number = False


class FirstNumbers(FirstMeans):
    """Keeps the first three, as Python's numbers."""

    as_number = True


class LastMeans(deque[Any]):
    """Keeps what it computes of the last three."""

    def append(self, value: Any) -> None:
        super().append(value[0] * 1)


LAST_MEANS = partial(LastMeans, maxlen=3)


class Rows(list[Any]):
    """Keeps each row on its own."""

    def append(self, value: Any) -> None:
        self.extend(value)


class Chunks(list[Any]):
    """Hands over what it has, and begins anew, whenever there are three."""

    def append(self, value: Any) -> None:
        if len(self) == 3:
            self.clear()
        super().append(value)


CONTAINERS: list[Callable[[], Any]] = [
    list, deque, partial(deque, maxlen=1), partial(deque, maxlen=4), First, EveryThird, Sample, Largest, Newest,
    partial(Newest, maxlen=3), Wrapped, FirstMeans, FirstNumbers, LAST_MEANS, Rows, Chunks,
]  # fmt: skip


def _number(value: Any) -> int:
    """The number of the pass that a value says it is of."""
    while isinstance(value, (tuple, dict)):
        value = value[-1] if isinstance(value, tuple) else value["x"]
    return int(value if isinstance(value, int) else value.flatten()[0])


class Nests(nn.Module):
    """Returns a tensor, or a nesting of it."""

    def __init__(self, nest: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.nest = nest

    def forward(self, x: Tensor) -> Any:
        return self.nest(x)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(CONTAINERS),
    st.sampled_from([lambda t: t, lambda t: (t + 1, {"x": t})]),
    st.integers(0, 30),
    st.randoms(use_true_random=False),
)
def test_the_passes_of_a_container_are_those_of_the_calls_that_it_keeps(
    make: Callable[[], Any], nest: Callable[[Tensor], Any], calls: int, seed: random.Random
) -> None:
    RANDOM.seed(seed.random())
    if make in (FirstMeans, LAST_MEANS, Rows):
        nest = lambda t: t  # noqa: E731
    net = Nests(nest)
    with record(net, "", into=make, stop_early=not calls) as acts:
        net(torch.zeros(2, 2))
        for number in range(1, calls):
            net(torch.full((2, 2), float(number)))
    assert acts[""].passes == [_number(value) for value in acts[""]]


@pytest.mark.parametrize("make", [partial(deque, maxlen=3), Wrapped, partial(LastMeans, maxlen=3)])
def test_a_copy_of_a_container_knows_the_passes(make: Callable[[], Any]) -> None:
    net = nn.Identity()
    with record(net, "", into=make) as acts:
        for _ in range(9):
            net(X)
    passes = acts[""].passes
    assert len(passes) == 3
    for layer in (copy.deepcopy(acts)[""], pickle.loads(pickle.dumps(acts))[""]):
        assert layer.passes == passes


def test_what_the_user_appends_to_a_container_belongs_to_no_pass() -> None:
    net = nn.Identity()
    with record(net, "", into=deque) as acts:
        net(X)
    acts[""].append(X)  # type: ignore[attr-defined]
    assert acts[""].passes == [0, -1]


@pytest.mark.parametrize("make", [First, EveryThird, Sample, Newest, Wrapped])
def test_gradients_are_refused_where_their_places_are_not_known(make: Callable[[], Any]) -> None:
    with pytest.raises(
        OptionError, match=rf"grads=True.*{make.__name__} has an append\(\) of its own"
    ):
        record(nn.Linear(4, 4), "", grads=True, into=make).__enter__()


def test_nothing_is_remembered_of_what_a_container_does_not_keep() -> None:
    net = nn.Identity()
    with record(net, "", into=partial(deque, maxlen=2)) as acts:
        for _ in range(300):
            net(X)
    assert len(acts[""]._known) == 2  # type: ignore[attr-defined]


# --- Values of the user's own, from several threads ----------------------------------------------------


def test_threads_that_add_by_a_new_name_lose_nothing() -> None:
    net, names, interval = nn.Identity(), [f"n{n}" for n in range(100)], sys.getswitchinterval()
    barrier = threading.Barrier(4)
    sys.setswitchinterval(1e-6)
    try:
        with record(net, "") as acts:
            net(X)

            def work() -> None:
                for name in names:
                    barrier.wait(60)
                    acts.add(name, X)

            _in_threads([work] * 4)
    finally:
        sys.setswitchinterval(interval)
    assert {len(acts[name]) for name in names} == {4}
    assert {tuple(acts[name].passes) for name in names} == {(0,) * 4}
