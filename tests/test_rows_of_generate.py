"""Rows of what ``generate()`` runs: those of each sequence run alone, without padding and in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from actrec import load, record
from actrec.data import rows, shuffled

if TYPE_CHECKING:
    from pathlib import Path

LAYER = "model.layers.1"
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    most = max(map(len, prompts))
    ids = torch.tensor([[0] * (most - len(one)) + one for one in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def alone(model: Any, ids: Tensor) -> Tensor:
    """The states of a sequence that is run alone."""
    with torch.no_grad(), record(model, LAYER) as acts:
        model(input_ids=ids[None])
    value: Any = acts[LAYER][0]
    return (value if isinstance(value, Tensor) else value[0])[0]


def generated(model: Any, path: Any, **options: Any) -> Any:
    """Two units, each of some prompts."""
    with torch.no_grad(), record(model, LAYER, inputs={"": None}, into=path) as acts:
        for key, prompts in (("a", PROMPTS[:2]), ("b", PROMPTS[2:])):
            batch = padded(prompts)
            with acts.unit(key):
                out = model.generate(**batch, do_sample=False, **options)
                acts.add("ids", out[:, :-1])
                acts.add("prompt", batch["attention_mask"])
    return acts


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_states_of_ragged_prompts_and_what_was_generated(
    llama: Any, tmp_path: Path, stored: bool, ends: bool
) -> None:
    first = llama.generate(**padded(PROMPTS[:2]), do_sample=False, max_new_tokens=6)
    eos = int(first[0, 6]) if ends else 2  # what the first sequence says as its third token
    path = tmp_path / "r"
    acts = generated(llama, path if stored else list, max_new_tokens=6, eos_token_id=eos)
    acts = load(path) if stored else acts
    whole = rows(acts, LAYER, "ids", "unit", "sample", "position", flatten=True, mask="prompt")
    real = rows(
        acts, LAYER, "ids", "unit", "sample", "position", flatten=True,
        mask=lambda values: values["ids"] != 0,
    )  # fmt: skip
    assert len(real) < len(whole) if ends else len(real) == len(whole)
    assert whole[:][2] == sorted(whole[:][2])
    hidden, ids, units, samples, positions = real[:]
    for number, prompt in enumerate(PROMPTS):
        mine = [
            at
            for at, (unit, sample) in enumerate(zip(units, samples.tolist(), strict=True))
            if (unit, sample) == ("ab"[number // 2], number % 2)
        ]
        assert ids[mine][: len(prompt)].tolist() == prompt
        assert positions[mine].diff().eq(1).all()
        torch.testing.assert_close(hidden[mine], alone(llama, ids[mine]), rtol=1e-4, atol=1e-5)
    (batch,) = shuffled(acts, "ids", "unit", LAYER, mask="prompt", flatten=True, batch_size=999)
    assert sorted(zip(batch[1], batch[0].tolist(), strict=True)) == sorted(
        zip(whole[:][2], whole[:][1].tolist(), strict=True)
    )
    last = rows(acts, "ids", LAYER, mask="prompt", last=True)
    assert last.where([0, 3]).unit == ["a", "b"]
    assert len(last) == 4
    assert ", 'unit' key, 'sample' () int64, " in repr(whole)
    assert whole.where(0).unit == "a"


def test_beams_are_samples_with_the_mask_that_the_model_was_given(llama: Any) -> None:
    acts = generated(llama, list, max_new_tokens=4, num_beams=3, eos_token_id=39)
    calls: dict[str, list[Tensor]] = {"a": [], "b": []}
    masks: dict[str, list[Tensor]] = {"a": [], "b": []}
    given = acts.inputs[""]
    for value, received, unit in zip(acts[LAYER], given, acts[LAYER].units, strict=True):
        state: Any = value
        calls[unit].append(state if isinstance(state, Tensor) else state[0])
        masks[unit].append(received["attention_mask"])
    found = rows(acts, LAYER, "unit", flatten=True, mask=(given, "attention_mask"))
    expected = [
        torch.cat(calls[unit], 1)[masks[unit][-1][:, : sum(c.shape[1] for c in calls[unit])] != 0]
        for unit in "ab"
    ]
    assert torch.equal(found[:][0], torch.cat(expected))
    assert found[:][1] == ["a"] * len(expected[0]) + ["b"] * len(expected[1])


def test_routers_of_a_mixture_have_the_rows_of_the_tokens() -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
    ).eval()
    gate = "model.layers.1.mlp.gate"
    name = gate if gate in dict(model.named_modules()) else "model.layers.1.block_sparse_moe.gate"
    batch = padded(PROMPTS)
    with torch.no_grad(), record(model, [name, LAYER]) as acts, acts.unit(7):
        model.generate(**batch, do_sample=False, max_new_tokens=3, eos_token_id=39)
        acts.add("mask", batch["attention_mask"])
    value: Any = acts[name][0]
    router: Any = name if isinstance(value, Tensor) else (name, 0)
    with torch.no_grad(), record(model, name) as again:
        for prompt in PROMPTS:
            model(input_ids=torch.tensor([prompt]))
    scores, unit, sample, position = rows(
        acts, router, "unit", "sample", "position", flatten=True, mask="mask"
    )[:]
    assert set(unit.tolist()) == {7}
    for number in range(len(PROMPTS)):
        mine = (sample == number) & (position < 4)
        own: Any = again[name][number]
        own = own if isinstance(own, Tensor) else own[0]
        torch.testing.assert_close(scores[mine], own, rtol=1e-4, atol=1e-5)
    both = rows(acts, LAYER, router, flatten=True, mask="mask")[:]
    assert torch.equal(both[1], scores)


IMAGE = 3  # stands four times in a prompt with an image
VISION, LANGUAGE = "model.vision_tower.**.layers.1", "model.language_model.layers.1"


def test_a_model_that_sees_has_rows_of_text_and_images_and_its_vision_tower_where_there_are_any() -> (
    None
):
    torch.manual_seed(0)
    sees = CLIPVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=sees, text_config=LlamaConfig(**SIZES), image_token_index=IMAGE, vision_feature_layer=-1
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    images = torch.randn(2, 3, 8, 8)
    prompts = {"seen": [[1, *[IMAGE] * 4, 5], [1, *[IMAGE] * 4, 6, 7, 8]], "told": PROMPTS[:2]}
    with torch.no_grad(), record(model, [LANGUAGE, VISION]) as acts:
        for key, some in prompts.items():
            batch = padded(some) | ({"pixel_values": images} if key == "seen" else {})
            with acts.unit(key):
                out = model.generate(**batch, do_sample=False, max_new_tokens=3, eos_token_id=39)
                acts.add("ids", out[:, :-1])
                acts.add("mask", batch["attention_mask"])
                acts.add("label", torch.tensor([0, 1]))
    hidden, ids, unit, sample = rows(
        acts, LANGUAGE, "ids", "unit", "sample", flatten=True, mask="mask"
    )[:]
    for key, number in ((key, number) for key in prompts for number in range(2)):
        mine = [at for at, one in enumerate(unit) if one == key and sample[at] == number]
        assert ids[mine][:-2].tolist() == prompts[key][number]
        with torch.no_grad(), record(model, LANGUAGE) as alone:
            given = {"pixel_values": images[number : number + 1]} if key == "seen" else {}
            model(input_ids=ids[mine][None], **given)
        torch.testing.assert_close(hidden[mine], alone[LANGUAGE][0][0], rtol=1e-4, atol=1e-5)
    (tower,) = acts.select(VISION)
    patches, label, unit = rows(acts, tower, "label", "unit", flatten=True, passes="common")[:]
    assert torch.equal(patches, acts[tower][0].flatten(0, 1))
    assert (label.tolist(), set(unit)) == ([0] * 5 + [1] * 5, {"seen"})
    of_images = rows(acts, LANGUAGE, flatten=True, mask=lambda values: values["ids"] == IMAGE)
    assert [of_images.where(at) for at in (0, 7)] == [("seen", 0, 3), ("seen", 1, 4)]
    assert len(of_images) == 8
