"""Rows of tokens: those that count, whatever padding and however many calls they came in, and where each is from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from actrec import AlignmentError, OptionError, load, record
from actrec.data import rows, shuffled
from actrec.store import Folder
from tests.stored import same

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WIDTH = 3
EXPERTS = 2
HEADS = 2


class Steps(nn.Module):
    """Calls its layers with each of some tensors (batch, tokens, WIDTH), as a model does that generates."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Identity()
        self.router = nn.Identity()
        self.head = nn.Identity()

    def forward(self, steps: Sequence[Tensor]) -> None:
        for step in steps:
            self.hidden(step)
            self.router(step.flatten(0, 1)[:, :EXPERTS].double())
            self.head(step[..., :HEADS, None].expand(-1, -1, -1, 2).half())


class Pass:
    """A pass with calls of some sizes: every element of it occurs once in a recording."""

    def __init__(self, batch: int, tokens: list[int], mask: Tensor) -> None:
        self.batch, self.tokens, self.mask = batch, tokens, mask
        self.total = sum(tokens)

    def values(self, start: int) -> Tensor:
        size = self.batch * self.total * WIDTH
        return (torch.arange(size) + start).float().view(self.batch, self.total, WIDTH)


@st.composite
def passes(draw: Any) -> list[Pass]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        batch, prompt = draw(st.integers(1, 3)), draw(st.integers(2, 4))
        tokens = [prompt, *[1] * draw(st.integers(0, 3))]
        lengths = draw(st.lists(st.integers(1, prompt), min_size=batch, max_size=batch))
        real = torch.arange(prompt) < torch.tensor(lengths)[:, None]
        mask = torch.ones(batch, sum(tokens), dtype=torch.bool)
        mask[:, :prompt] = real.flip(1) if draw(st.booleans()) else real
        found.append(Pass(batch, tokens, mask))
    return found


def recorded(given: list[Pass], into: Any = list) -> Any:
    model, start = Steps(), 0
    with record(model, ["hidden", "router", "head"], into=into) as acts:
        for one in given:
            values = one.values(start)
            start += values.numel()
            steps = values.split(one.tokens, 1)
            model(steps)
            acts.add("ids", values[..., 0].long())
            acts.add("mask", one.mask)
            acts.add("prompt", one.mask[:, : one.tokens[0]].long())
            acts.add("label", values[:, 0, 0].long())
            for end in torch.tensor(one.tokens).cumsum(0).tolist():
                acts.add("of step", one.mask[:, :end].float())
    return acts


def expected(given: list[Pass]) -> dict[str, Tensor]:
    """What each row is, made in another way: sample by sample."""
    found: dict[str, list[Any]] = {
        name: [] for name in ("hidden", "ids", "label", "unit", "sample", "position")
    }
    start = 0
    for number, one in enumerate(given):
        values = one.values(start)
        start += values.numel()
        for sample in range(one.batch):
            for position in range(one.total):
                if one.mask[sample, position]:
                    row = values[sample, position]
                    found["hidden"].append(row)
                    found["ids"].append(row[0].long())
                    found["label"].append(values[sample, 0, 0].long())
                    for name, index in (
                        ("unit", number),
                        ("sample", sample),
                        ("position", position),
                    ):
                        found[name].append(torch.tensor(index))
    return {name: torch.stack(column) for name, column in found.items()}


NAMES = ["hidden", "ids", "label", "unit", "sample", "position"]
MASKS: dict[str, Any] = {
    "of the pass": "mask",
    "of the prompt": "prompt",
    "of each step": "of step",
    "a function": lambda values: values["mask"],
    "a function of steps": lambda values: (values["hidden"][..., 0] >= 0) & values["mask"],
}  # fmt: skip


@given(given=passes(), data=st.data(), stored=st.booleans())
@settings(max_examples=25, deadline=None)
def test_rows_are_the_real_tokens_of_each_sample_whatever_calls_they_came_in(
    tmp_path_factory: pytest.TempPathFactory, given: list[Pass], data: Any, stored: bool
) -> None:
    path = tmp_path_factory.mktemp("rows") / "r"
    acts = recorded(given, Folder(path, shard_bytes=3000) if stored else list)
    acts = load(path) if stored else acts
    mask = MASKS[data.draw(st.sampled_from([*MASKS]))]
    wanted = expected(given)
    dataset = rows(acts, *NAMES, flatten=True, mask=mask)
    for name, column in zip(NAMES, dataset[:], strict=True):
        assert same(column, wanted[name]), name
    some = data.draw(st.lists(st.integers(0, len(dataset) - 1), max_size=6))
    assert all(map(torch.equal, dataset.where(some), dataset[some][3:]))
    order = wanted["hidden"][:, 0].argsort()
    batches = shuffled(acts, *NAMES, flatten=True, mask=mask, batch_size=3, buffer=200)
    columns = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    back = columns[0][:, 0].argsort()
    for name, column in zip(NAMES, columns, strict=True):
        assert same(column[back], wanted[name][order]), name


@given(given=passes())
@settings(max_examples=12, deadline=None)
def test_the_last_real_token_is_a_row_of_each_sample(given: list[Pass]) -> None:
    acts, wanted = recorded(given), expected(given)
    key = wanted["unit"] * 100 + wanted["sample"]
    last = torch.cat([key[1:] != key[:-1], torch.tensor([True])])
    for mask in ("mask", "prompt"):
        for found in (
            rows(acts, *NAMES, mask=mask, last=True)[:],
            next(iter(shuffled(acts, *NAMES, mask=mask, last=True, batch_size=99))),
        ):
            order = found[0][:, 0].argsort()
            for name, column in zip(NAMES, found, strict=True):
                assert same(column[order], wanted[name][last]), name
    dataset = rows(acts, "hidden", mask="mask", last=True)
    where = dataset.where(slice(None))
    assert all(map(torch.equal, where, (wanted[name][last] for name in NAMES[3:])))


@given(given=passes())
@settings(max_examples=12, deadline=None)
def test_routers_and_heads_have_rows_beside_the_tokens(given: list[Pass]) -> None:
    acts, wanted = recorded(given), expected(given)
    for layers in (["router"], ["router", "hidden"], ["hidden", "router", "ids"]):
        found = rows(acts, *layers, "sample", "position", flatten=True, mask="mask")
        for name, column in zip(layers, found[:], strict=False):
            assert same(
                column, wanted["hidden"][:, :EXPERTS].double() if name == "router" else wanted[name]
            )
        assert all(map(torch.equal, found[:][-2:], (wanted["sample"], wanted["position"])))
    head, sample, position = rows(acts, "head", "sample", "position", flatten=True, mask="mask")[:]
    assert same(sample, wanted["sample"].repeat_interleave(HEADS))
    tokens = wanted["position"].repeat_interleave(HEADS)
    assert same(position, tokens * HEADS + torch.arange(len(tokens)) % HEADS)
    assert same(head, wanted["hidden"][:, :HEADS].half().reshape(-1, 1).expand(-1, 2).contiguous())


def test_the_padded_and_the_unpadded_run_give_the_same_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 3))
    sentences = [torch.randint(1, 50, (many,)) for many in (3, 5, 1, 4)]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in sentences], batch_first=True)
    right = nn.utils.rnn.pad_sequence(sentences, batch_first=True)
    left = torch.stack([one.roll(5 - len(own)) for one, own in zip(right, sentences, strict=True)])
    found = []
    for batches in ([one[None] for one in sentences], [right], [left], [left[:2], right[2:]]):
        with record(model, "1") as acts:
            for ids in batches:
                model(ids)
                acts.add("ids", ids)
        function = lambda values: values["ids"] != 0  # noqa: E731
        found.append(rows(acts, "1", "ids", flatten=True, mask=function)[:])
        last = rows(acts, "ids", mask=function, last=True)[:]
        assert last.tolist() == [int(one[-1]) for one in sentences]
    assert int(mask.sum()) == len(found[0][0])
    for hidden, ids in found[1:]:
        assert same(ids, found[0][1])
        torch.testing.assert_close(hidden, found[0][0])


def test_tokens_of_many_steps_are_beside_the_value_that_has_all_of_them(tmp_path: Path) -> None:
    model, values = Steps(), torch.arange(2 * 40 * WIDTH).float().view(2, 40, WIDTH)
    with record(model, "hidden", into=tmp_path / "r") as acts:
        model(values.split(1, 1))
        acts.add("ids", values[..., 0].long())
    (batch,) = shuffled(load(tmp_path / "r"), "hidden", "ids", flatten=True, batch_size=99)
    assert same(batch[0][:, 0].long(), batch[1])
    assert len(batch[1].unique()) == 80


def test_packed_documents_are_told_apart_by_what_is_added() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, -1], [2, 3, 3, 3, -1, -1]])
    model = nn.Identity()
    with record(model, "") as acts:
        model(torch.arange(36.0).view(2, 6, 3))
        acts.add("document", documents)
    _, document, position = rows(
        acts, "", "document", "position", flatten=True, mask=lambda values: values["document"] >= 0
    )[:]
    assert document.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert position.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    ends = torch.cat([documents[:, 1:] != documents[:, :-1], torch.ones(2, 1, dtype=torch.bool)], 1)
    ends &= documents >= 0
    assert same(rows(acts, "", flatten=True, mask=ends)[:], acts[""][0][ends])


def test_a_mask_longer_than_a_step_counts_the_cache_before_it() -> None:
    model = Steps()
    with record(model, "hidden") as acts:
        for many, tokens in ((3, 3), (4, 1), (6, 2)):  # each step a pass of its own
            model([torch.full((2, tokens, WIDTH), float(many))])
            acts.add("mask", (torch.arange(many) != many - 1).expand(2, many))
    found = rows(acts, "hidden", "unit", "position", flatten=True, mask="mask")[:]
    assert found[1].tolist() == [0, 0, 0, 0, 2, 2]
    assert found[2].tolist() == [0, 1, 0, 1, 0, 0]


class Vision(nn.Module):
    """Looks at images only where there are any, and at tokens in steps."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Identity()
        self.text = nn.Identity()

    def forward(self, images: Tensor | None, *tokens: Tensor) -> None:
        if images is not None:
            self.vision(images)
        for step in tokens:
            self.text(step)


@pytest.mark.parametrize("stored", [False, True])
def test_layers_that_ran_in_some_passes_only_are_aligned_by_pass(
    tmp_path: Path, stored: bool
) -> None:
    model = Vision()
    path = tmp_path / "r"
    with record(model, ["vision", "text"], into=path if stored else list) as acts:
        for number in range(4):
            images = torch.full((2, 5, 4), float(number)) if number % 2 else None
            model(images, *(torch.full((2, many, 3), float(number)) for many in (4, 1)))
            acts.add("label", torch.tensor([number, number + 10]))
    acts = load(path) if stored else acts
    with pytest.raises(AlignmentError, match=r'\(passes="common"\)'):
        rows(acts, "vision", "label")
    vision, label = rows(acts, "vision", "label", passes="common")[:]
    assert vision.shape == (4, 5, 4)
    assert label.tolist() == [1, 11, 3, 13]
    vision, label, unit = rows(acts, "vision", "label", "unit", passes="common", flatten=True)[:]
    assert same(vision[:, 0], (label % 10).float())
    assert same(unit, label % 10)
    (batch,) = shuffled(acts, "text", "label", "unit", flatten=True, passes="common", batch_size=99)
    assert same(batch[0][:, 0], batch[2].float())
    assert len(batch[0]) == 4 * 2 * 5
    image = lambda values: torch.ones(2, 5) * (values["vision"][:, :, 0] > 1)  # noqa: E731
    (found,) = rows(acts, "text", passes="common", mask=image, flatten=True)[:].unique(dim=0)
    assert found.tolist() == [3, 3, 3]
    with pytest.raises(OptionError, match=r"passes='some'.*\"common\""):
        rows(acts, "text", passes="some")  # type: ignore[arg-type]


def test_micro_batches_with_labels_are_batches_of_their_own() -> None:
    model = Steps()
    with record(model, ["hidden"]) as acts:
        for number in range(2):
            micro = [torch.full((2, many, WIDTH), 10.0 * number + many) for many in (4, 3)]
            model(micro)
            for many in (4, 3):
                acts.add("label", torch.tensor([many, many + 100]) + 10 * number)
    hidden, label, unit, sample, position = rows(
        acts, "hidden", "label", "unit", "sample", "position", flatten=True
    )[:]
    assert (hidden[:, 0] == label % 100).all()
    assert (sample == (label % 10 == 3) * 2 + (label > 50)).all()
    assert position.tolist() == ([0, 1, 2, 3] * 2 + [0, 1, 2] * 2) * 2
    assert unit.tolist() == [0] * 14 + [1] * 14
    answers = torch.arange(8) % 2
    kept = rows(acts, "sample", "hidden", "label", flatten=True, mask=answers)[:]
    assert set(kept[0].tolist()) == {1, 3}
    assert rows(acts, "hidden", "label", "sample", last=True)[:][2].tolist() == [0, 1, 2, 3] * 2


def test_without_flatten_the_samples_of_a_pass_are_counted_on() -> None:
    model = nn.Sequential(nn.Identity())
    with record(model, "0") as acts:
        for number in range(2):
            model(torch.full((3, 2), float(number)))
    dataset = rows(acts, "0", "unit", "sample", "position")
    assert [column.tolist() for column in dataset[:][1:]] == [
        [0] * 3 + [1] * 3,
        [0, 1, 2] * 2,
        [0] * 6,
    ]
    assert dataset.where(4) == (1, 1, 0)
    assert dataset.where(-1).sample == 2
    with pytest.raises(IndexError, match="there are 6 rows"):
        dataset.where(6)


def test_what_was_recorded_under_such_a_name_comes_first() -> None:
    model = nn.Identity()
    with record(model, "") as acts:
        model(torch.zeros(2, 3))
        acts.add("sample", torch.tensor([7, 8]))
    assert rows(acts, "", "sample")[:][1].tolist() == [7, 8]
    with pytest.raises(OptionError, match="no layer was named"):
        rows(acts, "unit", "position")


def generated(prompt: int = 4, steps: int = 3) -> Any:
    model = Steps()
    with record(model, "hidden") as acts:
        model(torch.ones(4, prompt + steps, WIDTH).split([prompt, *[1] * steps], 1))
        acts.add("returned", torch.ones(4, prompt + steps + 1))
        acts.add("ids", torch.ones(4, prompt + steps + 1).long())
        acts.add("beams", torch.ones(2, prompt + steps))
        acts.add("encoder", torch.ones(4, 6))
        acts.add("two", torch.ones(4))
        acts.add("two", torch.ones(4))
    return acts


REFUSED = {
    "returned": ({"mask": "returned"}, r"generate\(\) returns was not run.*\[:, :-1\]"),
    "ids": ({"layers": ["ids"]}, r"generate\(\) returns was not run.*\[:, :-1\]"),
    "beams": ({"mask": "beams"}, r"If each sample was run 2 times.*repeat_interleave\(2, 0\)"),
    "calls": ({"layers": ["two"]}, r"'hidden' has 4, 'two' has 2.*take one call of each pass \(nth=0\)"),
    "flat": ({"layers": ["ids"], "flatten": False}, r"flatten=True\), for which the calls of a pass are joined"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_joined_calls_is_refused_with_what_to_do(name: str) -> None:
    options: dict[str, Any] = {"flatten": True, **REFUSED[name][0]}
    layers = options.pop("layers", [])
    with pytest.raises(AlignmentError, match=REFUSED[name][1]):
        rows(generated(), "hidden", *layers, **options)


def test_the_mask_of_an_encoder_is_none_of_the_decoder_that_generates() -> None:
    acts = generated(prompt=1, steps=8)
    with pytest.raises(
        AlignmentError, match=r"has shape \(4, 6\), and the rows are those of \(4, 9\)"
    ):
        rows(acts, "hidden", flatten=True, mask="encoder")


def test_calls_that_cannot_be_joined_are_named() -> None:
    model = Steps()
    with record(model, "hidden") as acts:
        model([torch.ones(2, 4, WIDTH), torch.ones(3, 4, WIDTH)])
        acts.add("mask", torch.ones(2, 8))
    assert len(rows(acts, "hidden", flatten=True)) == 20
    with pytest.raises(
        AlignmentError,
        match=r"'mask' is the only one of its pass, .* shapes \(2, 4, 3\), \(3, 4, 3\)\.",
    ):
        rows(acts, "hidden", flatten=True, mask="mask")


def test_a_function_is_a_mask_only_if_it_returns_a_tensor() -> None:
    acts = generated()
    with pytest.raises(OptionError, match=r"for pass 0 it has returned bool"):
        rows(acts, "hidden", flatten=True, mask=lambda _: True)  # type: ignore[arg-type,return-value]
    seen: list[Any] = []

    def mask(values: Any) -> Tensor:
        seen.append(([*values], len(values), "other" in values))
        return torch.ones(4, 7)

    assert len(rows(acts, "hidden", flatten=True, mask=mask)) == 28
    assert seen == [([*acts], len(acts), False)]


# --- Several recordings ------------------------------------------------------------------------------


def numbers(start: int, many: int, into: Any = list) -> Any:
    model = nn.Identity()
    with record(model, "", into=into) as acts:
        for part in torch.arange(start, start + many).float().split(7):
            model(part[:, None].expand(-1, 2))
            acts.add("odd", part % 2)
    return acts


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.5, 1, 2, 3]), min_size=3, max_size=3) | st.none(),
    buffer=st.sampled_from([200, 1000, 2**20]),
    world=st.integers(1, 3),
    drop_last=st.booleans(),
    masked=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_of_several_recordings_each_epoch_has_the_rows_that_the_weights_say(
    *, sizes: list[int], weights: Any, buffer: int, world: int, drop_last: bool, masked: bool
) -> None:
    recordings = [numbers(1000 * at, many) for at, many in enumerate(sizes)]
    weights = weights and weights[: len(sizes)]
    have = [many // 2 if masked else many for many in sizes]
    if weights is not None and 0 in have:
        with pytest.raises(OptionError, match=f"recording {have.index(0)} has no rows"):
            shuffled(recordings, "", batch_size=4, weights=weights, mask="odd")
        return
    expected = have
    if weights is not None:
        scale = min(many / weight for many, weight in zip(have, weights, strict=True))
        expected = [int(weight * scale + 1e-9) for weight in weights]
    seen, counts = [], []
    for rank in range(world):
        dataset = shuffled(
            recordings, "", "recording", "unit", batch_size=4, weights=weights, buffer=buffer,
            rank=rank, world_size=world, drop_last=drop_last, mask="odd" if masked else None,
        )  # fmt: skip
        batches = list(dataset)
        assert len(batches) == len(dataset)
        counts.append(len(batches))
        state = dataset.state_dict(batches=len(batches) // 2)
        dataset.set_epoch(0)
        dataset.load_state_dict({**state, "epoch": 0})
        assert all(
            map(
                same,
                next(zip(*list(dataset), strict=True), ()),
                next(zip(*batches[len(batches) // 2 :], strict=True), ()),
            )
        )
        for row, recording, unit in batches:
            assert same(row[:, 0] // 1000, recording.float())
            assert same(row[:, 0] % 1000 // 7, unit.float())
            seen += row[:, 0].tolist()
    assert len(set(seen)) == len(seen)
    found = [sum(row // 1000 == at for row in seen) for at in range(len(sizes))]
    if drop_last:
        assert len(set(counts)) == 1
        assert sum(expected) - len(seen) <= (4 + len(sizes)) * world
    else:
        assert found == expected


def test_every_window_has_its_share_of_each_recording() -> None:
    a, b = numbers(0, 3000), numbers(5000, 1000)
    dataset = shuffled([a, b], "recording", "", batch_size=100, buffer=20_000)
    shares = [recording.float().mean().item() for recording, _ in dataset]
    assert all(0.05 < share < 0.5 for share in shares)
    first, second = ([row for _, row in dataset] for _ in range(2))
    assert not same(torch.cat(first), torch.cat(second))


def test_a_stored_recording_lies_beside_one_in_memory_in_one_loader(tmp_path: Path) -> None:
    numbers(0, 20, tmp_path / "r")
    batches = shuffled([load(tmp_path / "r"), numbers(20, 10)], "", "odd", batch_size=30, last=True)
    ((row, odd),) = batches
    assert row[:, 0].sort()[0].tolist() == [*range(30)]
    assert same(row[:, 0] % 2, odd)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda a, _: shuffled([], "", batch_size=1), OptionError, "there is no recording in the list"),
    "layer": (lambda a, b: shuffled([a, b], a[""], batch_size=1), OptionError, "a layer object belongs to one recording. Give its name"),
    "steps": (lambda a, b: shuffled([a, b], (a[""], 0), batch_size=1), OptionError, "a layer object belongs to one recording. Give its name"),
    "mask": (lambda a, b: shuffled([a, b], "", batch_size=1, mask=torch.ones(9)), OptionError, "a tensor is the mask of one recording"),
    "shape": (lambda a, b: shuffled([a, b], "odd", batch_size=1), AlignmentError, r"'odd' has rows of shape \(\) and torch.float32 in recording 0, and of shape \(2,\)"),
    "empty": (lambda a, b: shuffled([a, numbers(0, 0)], "", batch_size=1, weights=[1, 1]), OptionError, "recording 1 has no rows"),
    **{
        str(weights): (lambda a, _, w=weights: shuffled([a, a], "", batch_size=1, weights=w), OptionError, r"greater than 0 for each of 2 recordings")
        for weights in ([1], [1, 0], [1, -2], [1, True], [1, float("inf")], [1, "2"], 3, [1, float("nan")])
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_recordings_that_make_no_loader_are_refused(name: str) -> None:
    call, error, message = WRONG[name]
    other = nn.Identity()
    with record(other, "") as acts:
        other(torch.zeros(3, 2))
        acts.add("odd", torch.zeros(3, 2))
    with pytest.raises(error, match=message):
        call(numbers(0, 9), acts)


# --- Units -------------------------------------------------------------------------------------------


def of_units(keys: Sequence[Any], into: Any = list, *, failing: Sequence[Any] = ()) -> Any:
    """Units in some order, each with a value of its own in every call."""
    model = Steps()
    with record(model, "hidden", into=into) as acts:
        for key in keys:
            value = float(hash(key) % 1000 if isinstance(key, str) else key)
            try:
                with acts.unit(key):
                    model([torch.full((2, 3, WIDTH), value), torch.full((2, 1, WIDTH), value)])
                    if key in failing:
                        raise ValueError
                    model([torch.full((2, 1, WIDTH), value)])
                    acts.add("label", torch.tensor([value, -value]))
            except ValueError:
                continue
    return acts


@given(
    order=st.permutations([3, 1, 4, 15]),
    failing=st.sets(st.sampled_from([3, 1, 4, 15]), max_size=2),
)
@settings(max_examples=12, deadline=None)
def test_layers_of_two_recordings_are_aligned_by_the_keys_of_their_units(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], failing: set[int]
) -> None:
    path = tmp_path_factory.mktemp("units") / "r"
    a, b = of_units([3, 1, 4, 15]), of_units(order, path, failing=[*failing])
    for other in (b, load(path)):
        if failing:
            with pytest.raises(AlignmentError, match=r"in unit \d+.*passes=\"common\""):
                rows(a, "hidden", other["hidden"], flatten=True)
        found = rows(a, "hidden", other["hidden"], "label", "unit", flatten=True, passes="common")
        one, two, label, unit = found[:]
        assert len(one) == (4 - len(failing)) * 2 * 5
        assert same(one, two)
        assert same(one[:, 0], label.abs())
        assert same(one[:, 0].long(), unit)


def test_two_keys_of_strings_and_of_integers_come_in_one_loader() -> None:
    a, b = of_units(["x", "y"]), of_units([7, 8, 9])
    batches = shuffled([a, b], "unit", "hidden", "recording", flatten=True, batch_size=4)
    seen = set()
    for unit, hidden, recording in batches:
        assert isinstance(unit, list)
        for key, row, number in zip(unit, hidden[:, 0].tolist(), recording.tolist(), strict=True):
            assert isinstance(key, (str, int)[number])
            assert row == (hash(key) % 1000 if isinstance(key, str) else key)
            seen.add(key)
    assert seen == {"x", "y", 7, 8, 9}
    assert rows(a, "unit", "hidden", flatten=True)[3][0] == "x"


def test_calls_outside_of_units_are_aligned_by_their_passes() -> None:
    model = nn.Identity()
    with record(model, "") as acts:
        model(torch.zeros(2, 3))
        with acts.unit("a"):
            model(torch.ones(2, 3))
    dataset = rows(acts, "", "unit")
    assert dataset[:][1] == [None, None, "a", "a"]
    assert repr(dataset) == "4 rows of '' (3,) float32, 'unit' key"
    assert dataset.where(2).unit == "a"


def test_numbers_of_one_unit_that_have_no_tokens_are_rows_one_after_the_other() -> None:
    model = nn.Identity()
    with record(model, "") as acts, acts.unit(0):
        model(torch.arange(3.0))
        model(torch.arange(2.0))
    assert rows(acts, "", flatten=True)[:].tolist() == [0, 1, 2, 0, 1]
