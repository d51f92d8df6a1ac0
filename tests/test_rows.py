"""``rows()``: what is a row never depends on how long a batch happens to be, and belongs to one call of one good pass."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actrec import (
    AlignmentError,
    CorruptRecordingError,
    OptionError,
    load,
    record,
)
from actrec.data import numbering as _numbering
from actrec.data import rows, shuffled
from actrec.data.calls import Calls
from actrec.data.steps import steps
from actrec.store import Folder
from actrec.store import disk as _disk
from actrec.store import rank as _rank
from tests.stored import Operations, same

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

WIDTH = 7


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.arange(1, size + 1).to(dtype).view(shape)


def beside(calls: Sequence[tuple[int, int]], make: Callable[[int, int], Tensor]) -> Any:
    """A layer of (batch, tokens, width), and a value of each call's own shape."""
    model = nn.Identity()
    with record(model, "") as acts:
        for batch, tokens in calls:
            model(numbered(batch, tokens, WIDTH))
            acts.add("value", make(batch, tokens))
            acts.add("mask", torch.ones(batch, tokens, dtype=torch.bool))
    return acts


def repeated(acts: Any, calls: Sequence[tuple[int, int]]) -> Tensor:
    pairs = zip(acts["value"], calls, strict=True)
    return torch.cat([value.repeat_interleave(tokens, 0) for value, (_, tokens) in pairs])


sizes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4)


# --- Which dimensions are positions ------------------------------------------------------------------


@given(calls=sizes, width=st.integers(1, 5), masked=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_vector_of_each_sample_is_repeated_or_the_shapes_do_not_tell(
    calls: list[tuple[int, int]], width: int, masked: bool
) -> None:
    acts = beside(calls, lambda batch, _: numbered(batch, width))
    mask = "mask" if masked else None
    if {tokens for _, tokens in calls} == {width}:
        with pytest.raises(AlignmentError, match=r"can be read in 2 ways: one number for each row"):
            rows(acts, "", "value", flatten=True, mask=mask)
    else:
        found = rows(acts, "", "value", flatten=True, mask=mask)[:][1]
        assert same(found, repeated(acts, calls))


@given(calls=sizes)
@settings(max_examples=60, deadline=None)
def test_floating_point_numbers_of_each_position_need_lengths_that_vary(
    calls: list[tuple[int, int]],
) -> None:
    acts = beside(calls, numbered)
    if len({tokens for _, tokens in calls}) == 1:
        with pytest.raises(AlignmentError, match="can be read in 2 ways"):
            rows(acts, "", "value", flatten=True)
    else:
        found = rows(acts, "", "value", flatten=True)[:][1]
        assert same(found, torch.cat([value.view(-1) for value in acts["value"]]))


@given(calls=sizes, width=st.integers(1, 5), dtype=st.sampled_from([torch.int64, torch.bool]))
@settings(max_examples=50, deadline=None)
def test_integers_are_a_number_of_each_position_or_refused(
    calls: list[tuple[int, int]], width: int, dtype: torch.dtype
) -> None:
    ids = beside(calls, lambda batch, tokens: numbered(batch, tokens, dtype=dtype))
    flat = torch.cat([value.view(-1) for value in ids["value"]])
    assert same(rows(ids, "", "value", flatten=True)[:][1], flat)
    assert same(rows(ids, "value", flatten=True)[:], flat)
    other = beside(calls, lambda batch, _: numbered(batch, width, dtype=dtype))
    if {tokens for _, tokens in calls} - {width, 1}:
        with pytest.raises(AlignmentError, match="Integers are one number for each position"):
            rows(other, "", "value", flatten=True)


@given(calls=sizes, experts=st.integers(1, 5), whole=st.booleans())
@settings(max_examples=50, deadline=None)
def test_what_a_router_returns_has_the_rows_of_the_layer_before_it(
    calls: list[tuple[int, int]], experts: int, whole: bool
) -> None:
    acts = beside(calls, lambda batch, tokens: numbered(batch * tokens, experts))
    layers = ["value", ""] if whole else ["value"]
    mask = None if whole else "mask"
    if {tokens for _, tokens in calls} == {1} == {experts}:  # (batch, 1) is also (batch, tokens)
        with pytest.raises(AlignmentError, match="can be read in 2 ways"):
            rows(acts, *layers, flatten=True, mask=mask)
    else:
        found = rows(acts, *layers, flatten=True, mask=mask)[:]
        assert same(found[0] if whole else found, acts["value"].cat())


READINGS: dict[str, tuple[Callable[[int, int], Tensor], Callable[[Tensor], Tensor]]] = {
    "a vector, repeated": (lambda b, t: numbered(b, 1, t), lambda v: v.expand(3, 4, 4)),
    "a number of each": (lambda b, t: numbered(b, t, 1), lambda v: v),
    "labels": (lambda b, _: numbered(b), lambda v: v[:, None].expand(3, 4)),
    "labels of all positions": (lambda b, t: numbered(b * t), lambda v: v.view(3, 4)),
    "a matrix of each": (lambda b, t: numbered(b * t, 2, 5), lambda v: v.view(3, 4, 2, 5)),
    "integers, repeated": (lambda b, t: numbered(b, 1, t, dtype=torch.int64), lambda v: v.expand(3, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", READINGS)
def test_a_shape_that_says_what_is_repeated_is_read_so(name: str) -> None:
    make, expected = READINGS[name]
    acts = beside([(3, 4)], make)
    found = rows(acts, "", "value", flatten=True)[:][1]
    assert same(found, expected(acts["value"][0]).flatten(0, 1).contiguous())


def test_the_shapes_that_an_error_names_are_those_that_help() -> None:
    acts = beside([(3, 4)], numbered)
    with pytest.raises(AlignmentError) as caught:
        rows(acts, "", "value", flatten=True)
    shapes = [eval(text) for text in re.findall(r"the shape (\([^)]*\))", str(caught.value))]  # noqa: S307
    assert shapes == [(3, 4, 1), (3, 1, 4)]
    for shape in shapes:
        again = beside([(3, 4)], lambda b, t, shape=shape: numbered(b, t).view(shape))  # type: ignore[misc]
        assert len(rows(again, "", "value", flatten=True)[:][1]) == 12


def test_what_has_fewer_positions_than_heads_have_fits_two_readings() -> None:
    model = nn.Identity()
    with record(model, "") as acts:
        model(numbered(2, 3, 4, 5))  # (batch, heads, tokens, tokens)
        acts.add("hidden", numbered(2, 3, 6))
        acts.add("pooled", numbered(2, 8))
    with pytest.raises(
        AlignmentError,
        match=r"can be read in 2 ways: rows of shape \(6,\) \(for this reading, .*, or rows of shape \(3, 6\)\.",
    ):
        rows(acts, "", "hidden", flatten=True)
    assert rows(acts, "", "pooled", flatten=True)[:][1].shape == (24, 8)


def test_no_calls_have_no_rows_whatever_could_be_read() -> None:
    acts = beside([(0, 4)], numbered)
    assert len(rows(acts, "", "value", flatten=True)) == 0


def test_masks_of_two_calls_may_differ_in_their_number_of_dimensions() -> None:
    model = nn.Identity()
    with record(model, "") as acts:
        for shape in ((2, 1, 2), (3, 2)):
            model(numbered(shape[0], 5))
            acts.add("mask", torch.ones(shape))
    found = rows(acts, "", flatten=True, mask="mask")[:]
    assert same(found, acts[""].cat().repeat_interleave(2, 0))


# --- A mask that is a tensor -------------------------------------------------------------------------

CALLS = [(2, 3), (1, 3), (4, 3)]


@pytest.mark.parametrize("shape", [(21,), (7, 3), (7,)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_may_be_a_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    acts = beside(CALLS, lambda batch, _: numbered(batch))
    mask = (numbered(*shape) % 3 > 0).to(dtype)
    kept = (mask if mask.dim() > 1 or len(mask) == 21 else mask[:, None].expand(7, 3)).reshape(-1)
    hidden = acts[""].cat().flatten(0, 1)[kept != 0]
    dataset = rows(acts, "", flatten=True, mask=mask)
    batches = shuffled(acts, "", flatten=True, mask=mask, batch_size=50)
    mask.zero_()  # they have read it
    assert same(dataset[:], hidden)
    assert same(next(iter(batches)).sum(1).sort()[0], hidden.sum(1).sort()[0])


def test_without_flatten_a_mask_has_a_number_for_each_sample(tmp_path: Path) -> None:
    model = nn.Identity()
    with record(model, "", into=Folder(tmp_path / "r", shard_bytes=1)):
        for part in numbered(9, 2).split(2):
            model(part)
    mask = torch.arange(9) % 2 == 0
    assert same(rows(load(tmp_path / "r"), "", mask=mask)[:], numbered(9, 2)[mask])


def test_a_mask_that_fits_no_rows_is_refused() -> None:
    acts = beside([(2, 3), (1, 4)], lambda batch, _: numbered(batch))
    for shape in ((3, 4), (9,), ()):
        with pytest.raises(AlignmentError, match=r"a tensor of shape .*, and there are 10 rows"):
            rows(acts, "", flatten=True, mask=torch.ones(shape))
    with pytest.raises(OptionError, match="expected a plain tensor with one number for each row"):
        rows(acts, "", flatten=True, mask=torch.ones(10).to_sparse())


# --- One call of each pass ---------------------------------------------------------------------------


class Reused(nn.Module):
    """Calls one layer as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Identity()
        self.head = nn.Identity()

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        for number in range(times):
            self.relu(x * 10 + number)
        return self.head(x)  # type: ignore[no-any-return]


def reused(times: Sequence[int], into: Any = list, batch: int = 3) -> Any:
    model, start = Reused(), 0
    with record(model, ["relu", "head"], inputs=True, into=into) as acts:
        for many in times:
            model(torch.arange(start, start + batch), many)
            acts.add("label", torch.arange(start, start + batch))
            start += batch
    return acts


@given(times=st.lists(st.integers(1, 3), min_size=1, max_size=5), nth=st.integers(-4, 4))
@settings(max_examples=20, deadline=None)
def test_the_nth_call_of_each_pass_is_that_of_every_pass_that_has_it(
    tmp_path_factory: pytest.TempPathFactory, times: list[int], nth: int
) -> None:
    path = tmp_path_factory.mktemp("nth") / "r"
    live, memory = reused(times, Folder(path, shard_bytes=2000)), reused(times)
    starts = [sum(times[:number]) for number in range(len(times))]
    spans = [list(range(start, start + many)) for start, many in zip(starts, times, strict=True)]
    expected = [calls[nth] for calls in spans if -len(calls) <= nth < len(calls)]
    for acts in (memory, live, load(path)):
        relu = acts["relu"]
        if max(times) == 1:
            assert relu.nth(nth) is relu or len(relu.nth(nth)) == len(relu)
        elif not expected:
            with pytest.raises(
                OptionError,
                match=r"no pass has that many calls of layer 'relu', .* at most \d times",
            ):
                relu.nth(nth)
        else:
            found = relu.nth(nth)
            assert found.passes == [relu.passes[call] for call in expected]
            assert [value.tolist() for value in found] == [relu[call].tolist() for call in expected]
            assert (found.name, found.type) == ("relu", "Identity")
            assert same(rows(acts, found)[:], found.cat())
            assert same(rows(acts, "relu", nth=nth)[:], found.cat())


@pytest.mark.parametrize("stored", [False, True])
def test_rows_of_a_reused_layer_lie_beside_the_labels(tmp_path: Path, stored: bool) -> None:
    acts = reused([2, 2, 2], tmp_path / "r" if stored else list)
    with pytest.raises(AlignmentError, match=r"take one call of each pass \(nth=0\)"):
        rows(acts, "relu", "label")
    for nth in (0, 1, -1):
        relu, head, label = rows(acts, "relu", "head", "label", nth=nth)[:]
        assert (relu == label * 10 + nth % 2).all()
        assert (head == label).all()
    first, second = acts["relu"].nth(0), acts["relu"].nth(1)
    one, two, label = rows(acts, first, second, "label")[:]
    assert (two - one == 1).all()
    (batch,) = shuffled(acts, "relu", "label", nth=1, batch_size=9)
    assert (batch[0] == batch[1] * 10 + 1).all()


@given(times=st.lists(st.integers(0, 3), min_size=1, max_size=6))
@settings(max_examples=12, deadline=None)
def test_the_table_says_how_many_calls_there_are_in_a_pass(
    tmp_path_factory: pytest.TempPathFactory, times: list[int]
) -> None:
    path = tmp_path_factory.mktemp("nth") / "r"
    called = {many for many in times if many}
    if not called:
        return
    live, memory = reused(times, Folder(path, shard_bytes=2000)), reused(times)
    note = f"{'up to ' if len(called) > 1 else ''}{max(called)} per pass"
    for acts in (memory, live, load(path)):
        line = next(line for line in repr(acts).splitlines() if line.startswith("relu"))
        assert line.endswith(note) == (max(called) > 1), line


@pytest.mark.parametrize("nth", [True, "0", 1.0])
def test_which_call_is_a_whole_number(nth: Any) -> None:
    acts = reused([2])
    for read in (lambda: acts["relu"].nth(nth), lambda: rows(acts, "relu", nth=nth)):
        with pytest.raises(OptionError, match="0 for the first call of each pass"):
            read()


def test_of_several_ranks_it_is_the_nth_call_of_each(tmp_path: Path) -> None:
    for rank in range(2):
        reused([2, 2 + rank], Folder(tmp_path / "r", rank=rank, world_size=2, run="one"))
    acts = load(tmp_path / "r")
    last = acts["relu"].nth(-1)
    assert last.ranks == [0, 1, 0, 1]
    assert repr(last) == "Layer 'relu' (Identity): 4 calls, (3,) int64, 96 B"
    assert (
        rows(acts, acts["relu"].nth(-1), "label")[:][0].tolist()
        == rows(acts, "relu", "label", nth=-1)[:][0].tolist()
    )
    assert acts["relu"].nth(2).passes == [1]


@given(times=st.lists(st.integers(0, 3), min_size=1, max_size=6), order=st.booleans())
@settings(max_examples=12, deadline=None)
def test_the_passes_of_a_layer_are_a_view_that_reads_like_a_list(
    tmp_path_factory: pytest.TempPathFactory, times: list[int], order: bool
) -> None:
    path = tmp_path_factory.mktemp("passes") / "r"
    times = [1, *times]
    memory = reused(times)
    for rank in range(
        1 + order
    ):  # the calls of two ranks are not stored in the order of their passes
        reused(times, Folder(path, shard_bytes=2000, rank=rank, world_size=1 + order, run="one"))
    expected = [number for number, many in enumerate(times) for _ in range(many)]
    for acts, each in ((memory, 1), (load(path), 1 + order)):
        numbers = sorted(expected * each)
        passes = acts["relu"].passes
        assert passes == numbers
        assert passes == acts["relu"].passes
        assert passes != [*numbers, 1]
        assert passes != tuple(numbers)
        assert [passes[at] for at in range(-len(numbers), len(numbers))] == numbers * 2
        assert passes[1:-1] == numbers[1:-1]
        assert repr(passes) == repr(numbers)
        with pytest.raises(IndexError):
            passes[len(numbers)]


def test_the_passes_in_memory_are_not_copied_to_look_at_one() -> None:
    acts = reused([1])
    passes = acts["relu"].passes
    acts["relu"]._keep(torch.zeros(1), 7)
    assert passes == [0, 7]
    with pytest.raises(TypeError):
        passes[0] = 1


# --- Passes that raised ------------------------------------------------------------------------------


class Fragile(nn.Module):
    """Raises what it is told, between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()
        self.last = nn.Identity()

    def forward(self, x: Tensor, error: BaseException | None = None) -> Tensor:
        x = self.first(x)
        if error is not None:
            raise error
        return self.last(x)  # type: ignore[no-any-return]


GOOD = [0, 2, 3]


def fragile(error: BaseException, into: Any = list, *, resume: bool = False) -> Any:
    model = Fragile()
    with record(model, ["first", "last"], into=into, resume=resume) as acts:
        for number in range(4):
            try:
                model(torch.full((2,), number), None if number in GOOD else error)
            except type(error):
                continue
            acts.add("id", torch.full((2,), number))
    return acts


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()], ids=repr)
def test_a_pass_that_raised_is_known_and_leaves_no_rows(
    tmp_path: Path, error: BaseException
) -> None:
    memory = fragile(error)
    live = fragile(error, tmp_path / "a")
    memory.save(tmp_path / "b")
    for acts in (
        memory,
        live,
        load(tmp_path / "a"),
        load(tmp_path / "b"),
        load(tmp_path / "a", rank=0),
    ):
        assert acts.failed_passes == [1]
        assert "4 passes (1 raised)" in repr(acts)
        assert (len(acts["first"]), len(acts["last"])) == (4, 3)
        for layers in (["first", "last", "id"], ["last", "first"], ["first"]):
            dataset = rows(acts, *layers)
            found = dataset[:] if len(layers) > 1 else (dataset[:],)
            assert {tuple(column.tolist()) for column in found} == {(0, 0, 2, 2, 3, 3)}
            assert "without 1 pass that raised" in repr(dataset)
        first, number = next(iter(shuffled(acts, "first", "id", batch_size=6)))
        assert first.equal(number)


def test_what_raised_is_still_known_when_a_run_is_resumed(tmp_path: Path) -> None:
    fragile(ValueError(), tmp_path / "r")
    fragile(ValueError(), tmp_path / "r", resume=True)
    assert load(tmp_path / "r").failed_passes == [1, 5]
    assert len(rows(load(tmp_path / "r"), "first", "last")) == 12


def test_a_pass_fails_if_it_raises_not_if_it_is_part_of_handling_an_error() -> None:
    model = Fragile()
    outer = nn.Sequential(model)

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = outer

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner[0](x, ValueError())  # type: ignore[no-any-return]
            except ValueError:
                return self.inner(x)  # type: ignore[no-any-return]

    net = Tries()
    with record(net, "inner.0.last") as acts:
        net(torch.zeros(2))  # pass 0
        try:
            raise ValueError
        except ValueError:
            net(torch.zeros(2))  # pass 1
            with pytest.raises(TypeError):
                net()  # pass 2
        acts.clear()
        assert acts.failed_passes == []


def test_a_pass_in_which_the_block_was_left_is_not_whole() -> None:
    model = Fragile()
    with pytest.raises(KeyboardInterrupt), record(model, ["first", "last"]) as acts:
        model(torch.zeros(2))
        model(torch.zeros(2), KeyboardInterrupt())
    assert acts.failed_passes == [1]
    assert len(rows(acts, "first", "last")) == 2


def test_a_shard_that_says_nonsense_of_what_raised_is_damaged(tmp_path: Path) -> None:
    from tests.damage import rewrite

    fragile(ValueError(), tmp_path / "r")
    for wrong, message in (
        (["x"], r"raised\[0\] is "),
        ([9], "a pass raised that is not committed"),
        (3, "raised is 3, which is not a list"),
    ):
        for shard in (tmp_path / "r" / "rank-00000").glob("*.safetensors"):
            rewrite(shard, lambda about, wrong=wrong: about.update(raised=wrong))  # type: ignore[misc]
        with pytest.raises(CorruptRecordingError, match=message):
            load(tmp_path / "r")


# --- Stored beside in memory -------------------------------------------------------------------------


def test_a_stored_layer_lies_beside_one_in_memory(tmp_path: Path) -> None:
    model = nn.Identity()
    with record(model, "", into=Folder(tmp_path / "r", shard_bytes=1)), record(model, "") as memory:
        for part in numbered(14, 2).split(3):
            model(part)
    acts = load(tmp_path / "r")
    for one, other in ((acts, memory), (memory, acts)):
        a, b = rows(one, "", other[""])[:]
        assert same(a, b)
        assert same(a, numbered(14, 2))
    for a, b in shuffled(acts, "", memory[""], batch_size=4):
        assert same(a, b)


def test_what_is_in_memory_does_not_lie_beside_several_ranks(tmp_path: Path) -> None:
    for rank in range(2):
        memory = reused([2], Folder(tmp_path / "r", rank=rank, world_size=2, run="one"))
    memory = reused([2])
    with pytest.raises(
        AlignmentError,
        match=r"'head' was recorded by 2 ranks, and 'relu' is in memory.*load\(path, rank=0\)",
    ):
        rows(load(tmp_path / "r"), "head", memory["relu"])
    a, b = rows(load(tmp_path / "r", rank=1), "relu", memory["relu"])[:]
    assert same(a, b)


# --- Side by side, by runs ---------------------------------------------------------------------------


def calls_of(moments: list[tuple[int, int]], title: str) -> Calls:
    return Calls(
        title,
        torch.tensor(moments, dtype=torch.int64).view(-1, 2),
        None,
        {},
        torch.arange(len(moments)),
        torch.zeros(len(moments), 3, dtype=torch.int64),
        [],
        [],
    )


def call_by_call(layers: list[list[Any]], *, flatten: bool, common: bool) -> Any:
    """The same, one call after the other: the calls of each layer, which are those of whole passes, and their passes."""
    if all(own == layers[0] for own in layers):
        numbers = [[*range(len(layers[0]))] for _ in layers]
        return numbers, [[False] * len(layers[0]) for _ in layers], layers[0]
    passes: list[dict[Any, list[int]]] = [{} for _ in layers]
    for keys, found in zip(layers, passes, strict=True):
        for number, key in enumerate(keys):
            found.setdefault(key, []).append(number)
    shared = [key for key in passes[0] if all(key in found for found in passes)]
    numbers, whole, order = [[] for _ in layers], [[] for _ in layers], []
    for key in shared:
        counts = [len(found[key]) for found in passes]
        most = max(counts)
        if any(many not in {most, 1 if flatten else most} for many in counts):
            return None
        order += [key] * most
        for own, many in enumerate(counts):
            numbers[own] += passes[own][key] * (most // many)
            whole[own] += [many < most] * most
    if not common and max(map(len, passes)) > len(shared):
        return None
    return numbers, whole, order


#: Calls of ranks in passes, mostly of the same.
MOMENTS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(MOMENTS, st.lists(MOMENTS, max_size=2), st.lists(st.integers(0, 2), min_size=2, max_size=2), st.lists(st.booleans(), min_size=3, max_size=3))  # fmt: skip
def test_calls_are_put_side_by_side_as_if_one_by_one(
    first: list[Any], others: list[Any], copies: list[int], options: list[bool]
) -> None:
    flatten, common, many = options
    layers = [first, *others, *([one for one in first for _ in range(many)] for many in copies)]
    expected = call_by_call(layers, flatten=flatten, common=common)
    given = [calls_of(own, f"layer {at}") for at, own in enumerate(layers)]
    if expected is None:
        with pytest.raises(AlignmentError, match="do not have the same calls"):
            steps("rows", given, flatten=flatten, common=common)
        return
    numbers, whole, order = expected
    with mock.patch.object(_numbering, "_FEW", 0 if many else 4096):
        found = steps("rows", given, flatten=flatten, common=common)
    assert [one.numbers.tolist() for one in found.layers] == numbers
    assert found.whole.tolist() == whole
    passes = [*dict.fromkeys(order)]
    assert found.passes.tolist() == [passes.index(key) for key in order]
    assert found.names.tolist() == [number for _, number in passes]  # type: ignore[union-attr]


# --- Cost --------------------------------------------------------------------------------------------


def loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """A recording of which one shard stays open, and a list that grows by the name of each whose header is read."""
    read: list[str] = []
    opening = _rank.Shard
    monkeypatch.setattr(_rank, "_MOST_OPEN", 1)
    acts = load(path)
    monkeypatch.setattr(
        _rank,
        "Shard",
        lambda disk, name: read.append(name) or opening(disk, name),  # type: ignore[func-returns-value]
    )
    return acts, read


@pytest.mark.parametrize("nth", [None, -1])
def test_to_open_rows_takes_as_many_operations_however_many_calls(
    tmp_path: Path, nth: int | None
) -> None:
    counts = []
    for many in (5, 50):
        reused([2] * many, path := tmp_path / f"{many}")
        acts = load(path)
        layers = ["relu"] if nth is None else ["relu", "label"]
        rows(acts, *layers, nth=nth)  # the headers are read
        with Operations() as operations:
            rows(acts, *layers, nth=nth)
        counts.append(operations.count)
    assert counts[0] == counts[1] < 400


def test_each_header_is_read_once_however_many_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reused([2] * 12, Folder(tmp_path / "r", shard_bytes=30_000))
    acts, read = loaded(tmp_path / "r", monkeypatch)
    rows(acts, "relu")
    once = len(read)
    assert once > 3
    rows(acts, "relu", (acts.inputs["relu"], "input"), mask=("relu",))
    assert len(read) == 2 * once


def test_each_header_is_read_once_though_the_keys_of_units_are_read_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(4, 3)
    with record(model, "", into=Folder(tmp_path / "r", seconds=0), inputs=True) as acts:
        for key in range(6):
            with acts.unit(f"unit {key}"):
                model(torch.ones(2, 4))
        model(torch.ones(2, 4))  # of no unit, in a shard of its own
    acts, read = loaded(tmp_path / "r", monkeypatch)
    dataset = rows(acts, "", (acts.inputs[""], "input"))
    assert len(read) >= 5
    assert len(read) == len(set(read))
    assert dataset.where([0, 11, 12]).unit == ["unit 0", "unit 5", None]
    assert [*acts.done] == [f"unit {key}" for key in range(6)]
    assert len(read) == len(set(read)), "they are known now"


def test_the_units_of_a_rank_that_has_not_recorded_the_layer_are_known_too(tmp_path: Path) -> None:
    for rank, name in enumerate(("0", "1")):
        model = nn.Sequential(nn.Identity(), nn.Identity())
        with record(model, name, into=Folder(tmp_path, rank=rank, world_size=2, run="a")) as acts, acts.unit(rank):  # fmt: skip
            model(torch.ones(2, 4))
    acts = load(tmp_path)
    assert rows(acts, "0").where(0).unit == 0
    assert [*acts.done] == [0, 1]


# --- From a file -------------------------------------------------------------------------------------

read_in_one_go = _disk._read
READS: dict[str, Callable[..., int]] = {
    "as the system reads": read_in_one_go,
    "one by one, where the system has no better": _disk._read_one,
    "a few bytes at a time": lambda fd, views, at: read_in_one_go(fd, [views[0][:999]], at),
    "to somewhere in the next row": lambda fd, views, at: read_in_one_go(
        fd, [views[0], *(view[:999] for view in views[1:2])], at
    ),
}


@given(data=st.data(), how=st.sampled_from([*READS]))
@settings(max_examples=25, deadline=None)
def test_rows_of_a_file_are_those_asked_for_however_near_and_often(
    wide: tuple[Any, Tensor], data: st.DataObject, how: str
) -> None:
    dataset, whole = wide
    near = st.lists(st.integers(50, 75), max_size=30)  # of which some are read together
    wanted = [*data.draw(near), *data.draw(st.lists(st.integers(-200, 199), max_size=6))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_disk, "_read", READS[how])
        assert same(dataset[wanted], whole[wanted])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tensor]:
    """Rows of 2,800 bytes, and the same in memory."""
    path = tmp_path_factory.mktemp("wide") / "run"
    model = nn.Identity()
    with record(model, "", into=path):
        for batch in numbered(200, 700).split(50):
            model(batch)
    return rows(load(path), ""), numbered(200, 700)
