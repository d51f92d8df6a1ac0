"""Statistics and comparisons without padding: ``stats(mask=)`` and ``compare(mask=)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from actrec import AlignmentError, OptionError, UnknownLayerError, compare, load, record

if TYPE_CHECKING:
    from pathlib import Path


class Model(nn.Module):
    """Layers with the positions of tokens, in several ways, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.router, self.pooled, self.heads, self.both = (
            nn.Identity() for _ in range(5)
        )

    def forward(self, *steps: Tensor) -> None:
        for step in steps:
            batch, tokens, _ = step.shape
            self.hidden(step)
            self.router(step.flatten(0, 1))
            self.pooled(step.mean(1))
            self.heads(step.new_full((batch, 2, tokens, tokens), 7.0))
            self.both((step[..., 0].long(), step.mean(1, keepdim=True)))


MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])


def recorded(value: Tensor, *sizes: int, masks: list[Tensor] | None = None) -> Any:
    model = Model()
    with record(model) as acts:
        model(*value.split(sizes or value.shape[1], 1))
        for mask in [MASK] if masks is None else masks:
            acts.add("mask", mask)
        acts.add("label", torch.zeros(3))
    return acts


VALUE = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
PADDED = VALUE.masked_fill(MASK[..., None] == 0, float("nan"))


@pytest.mark.parametrize(
    ("sizes", "masks"),
    [
        ((5,), [MASK]),
        ((3, 2), [MASK]),
        ((3, 1, 1), [MASK]),
        ((3, 1, 1), [MASK[:, :3], MASK[:, :4], MASK]),
        ((3, 2), [MASK[:, :3], MASK[:, 3:].bool()]),
    ],
)
def test_what_a_mask_leaves_out_is_in_no_statistic(
    sizes: tuple[int, ...], masks: list[Tensor]
) -> None:
    acts = recorded(PADDED, *sizes, masks=masks)
    found = {row.layer + row.leaf: row for row in acts.stats(mask="mask")}
    real = VALUE[MASK != 0]
    for name in ("hidden", "router"):
        row = found[name]
        assert (row.count, row.nan, row.left_out) == (
            real.numel(),
            0,
            PADDED.numel() - real.numel(),
        )
        assert row.mean == pytest.approx(real.double().mean().item())
        assert (row.min, row.max) == (real.min(), real.max())
    assert found["both[0]"].count == len(real)
    for name, calls in (
        ("pooled", len(sizes)),
        ("both[1]", len(sizes)),
        ("heads", 1),
        ("label", 1),
    ):
        assert found[name].left_out == 0, name
        assert found[name].count >= calls * 3
    assert f"{found['hidden'].left_out} left out" in repr(acts.stats(mask="mask"))
    assert "left out" not in repr(acts.stats())


def test_the_mask_of_a_prompt_leaves_in_what_is_generated() -> None:
    acts = recorded(VALUE, 3, 1, 1, masks=[MASK[:, :3]])
    (row,) = [row for row in acts.stats(mask="mask") if row.layer == "hidden"]
    assert row.count == 4 * (int(MASK[:, :3].sum()) + 6)


def test_a_function_may_be_the_mask() -> None:
    acts = recorded(PADDED)
    found = acts.stats(mask=lambda values: values["both"][0] == values["both"][0].clone())
    assert found[0].left_out == 0
    found = acts.stats(mask=lambda values: values["mask"])
    assert {row.layer: row.nan for row in found}["hidden"] == 0


def test_padding_is_not_compared() -> None:
    other = VALUE.masked_fill(MASK[..., None] == 0, 100.0)
    a, b = recorded(VALUE), recorded(other)
    verdicts = {row.layer + row.leaf: row.equal for row in compare(a, b, mask="mask")}
    assert verdicts == {
        "hidden": True, "router": True, "both[0]": True, "heads": True, "mask": True, "label": True,
        "pooled": False, "both[1]": False,
    }  # fmt: skip
    (row,) = [row for row in compare(a, b, mask="mask") if row.layer == "hidden"]
    assert row.count == VALUE[MASK != 0].numel()


def test_the_same_tokens_are_compared_wherever_the_padding_is() -> None:
    lengths = torch.tensor([2, 5, 3])
    right = (torch.arange(5) < lengths[:, None]).long()
    left = right.flip(1)
    one, two = torch.zeros(3, 5, 4), torch.zeros(3, 5, 4)
    one[right != 0], two[left != 0] = VALUE[right != 0], VALUE[right != 0]
    a, b = recorded(one, masks=[right]), recorded(two, masks=[left])
    assert not compare(a, b)[0].close
    assert all(row.equal for row in compare(a, b, mask="mask") if row.layer in {"hidden", "router"})
    unpadded = recorded(two, masks=[])
    verdict = {row.layer: row.equal for row in compare(a, unpadded, mask="mask")}
    assert not verdict["hidden"], "the mask of a is that of both, where b has none"
    shorter = recorded(one[:, :4], masks=[])
    (row,) = [row for row in compare(a, shorter, mask="mask") if row.layer == "hidden"]
    assert row.note == "call 0: (3, 5, 4) and (3, 4, 4)"


def test_a_mask_that_says_nothing_is_refused() -> None:
    acts = recorded(VALUE)
    with pytest.raises(
        UnknownLayerError, match=r"stats\(mask='masks'\): nothing with that name.*acts.add"
    ):
        acts.stats(mask="masks")
    with pytest.raises(OptionError, match="expected the name of a mask"):
        acts.stats(mask=MASK)  # type: ignore[arg-type]
    for wrong, message in (
        (torch.ones(3), r"of shape \(3,\), not a tensor \(batch, tokens\)"),
        ("x", "is str, not"),
    ):
        with pytest.raises(AlignmentError, match=message):
            acts.stats(mask=lambda _, wrong=wrong: wrong)  # type: ignore[misc]
    for wrong in (torch.ones(3, 9), torch.ones(2, 5)):
        with pytest.raises(AlignmentError, match="no layer has the positions of the mask"):
            compare(recorded(VALUE, masks=[wrong]), acts, mask="mask")


def test_each_pass_needs_its_mask_unless_it_raised() -> None:
    model = Model()
    with record(model) as acts:
        model(VALUE)
        acts.add("mask", MASK)
        with pytest.raises(AttributeError):
            model(VALUE, None)  # type: ignore[arg-type]
    found = {row.layer: row for row in acts.stats(mask="mask")}
    assert found["hidden"].count == VALUE[MASK != 0].numel()
    assert found["hidden"].left_out == 2 * VALUE.numel() - found["hidden"].count
    with record(model) as acts:
        model(VALUE)
        acts.add("mask", MASK)
        model(VALUE)
    with pytest.raises(AlignmentError, match=r"pass 1 has no 'mask'. Add it to each pass"):
        acts.stats(mask="mask")


def test_tensors_without_positions_count_in_full() -> None:
    model = nn.Identity()
    with record(model, "") as acts:
        model(
            (torch.ones(3, 5, 4).to_sparse(), torch.ones(3, 5, device="meta"), torch.ones(3, 5, 2))
        )
        acts.add("mask", MASK)
    found = {row.leaf: row.left_out for row in acts.stats(mask="mask") if row.layer == ""}
    assert found == {"[0]": 0, "[1]": 0, "[2]": 2 * int((MASK == 0).sum())}


def test_a_tensor_that_some_passes_do_not_have_is_masked_in_the_others() -> None:
    model = nn.Identity()
    with record(model, "") as acts:
        for many in (1, 2):
            model((torch.ones(3, 5, 2),) * many)
            acts.add("mask", MASK)
    found = {row.leaf: row.count for row in acts.stats(mask="mask") if row.layer == ""}
    assert found == {"[0]": 2 * 2 * int(MASK.sum()), "[1]": 2 * int(MASK.sum())}


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Identity()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.hidden(x) * attention_mask[..., None]


def test_a_mask_may_be_a_layer_or_in_its_values_as_for_rows(tmp_path: Path) -> None:
    net = Padded()
    runs = []
    for value in (VALUE, PADDED):
        with record(net, ["hidden"], inputs={"": None}) as acts:
            net(value, attention_mask=MASK)
            acts.add("mask", MASK)
            acts.add("both", (torch.ones(2), {"mask": MASK}))
        runs.append(acts)
    acts, padded = runs
    acts.save(tmp_path / "run")
    expected = acts.stats(mask="mask")[0]
    assert (expected.layer, expected.left_out) == ("hidden", 4 * int((MASK == 0).sum()))
    for one in (acts, load(tmp_path / "run")):
        for mask in (
            (one.inputs[""], "attention_mask"),
            one["mask"],
            ("mask",),
            ("both", 1, "mask"),
        ):
            assert one.stats(mask=mask)[0] == expected
            assert not compare(one, padded)[0].equal
            assert compare(one, padded, mask=mask)[0].equal
    for wrong, error, message in (
        ((acts.inputs[""], "masks"), AlignmentError, r"the value of pass 0 has no \['masks'\]"),
        (("both", 3), AlignmentError, r"the value of pass 0 has no \[3\]"),
        (("masks", 3), UnknownLayerError, "nothing with that name was recorded"),
        ((3, 1), OptionError, "expected the name of a mask"),
        ((), OptionError, "expected the name of a mask"),
        ((lambda values: values["mask"], 1), OptionError, "expected the name of a mask"),
    ):
        with pytest.raises(error, match=message):
            acts.stats(mask=wrong)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            compare(acts, acts, mask=wrong)  # type: ignore[arg-type]
