"""Zero-shot retrieval in every direction, by one of three protocols.

A clip may have several captions, and a caption several clips. Every different caption is in the gallery once and is a
query once, and the rank of a query is that of the best of its true items. So five captions per clip are evaluated as is
usual, and where the captions are labels, R@1 of audio->text is the accuracy of zero-shot classification.

The protocols differ in the score of a pair:

- "dot": the dot product, which the model was trained on.
- "cosine": the cosine.
- "reweighted": that of the original repository's evaluation, which published figures come from (`ranking.Reweighted`).
  There a caption of n clips is n queries and stands in the gallery n times, each with all n clips as true items.
"""

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from pe_av.config import PAIRINGS
from pe_av.evaluation.embedder import EmbeddedWindows
from pe_av.evaluation.figures import average_precision_at_10, retrieval_metrics
from pe_av.evaluation.ranking import (
    BestWindows,
    DotProducts,
    Reweighted,
    checked_target,
    distinct_targets,
    others_at_or_above,
)

EMBEDDINGS = tuple(dict.fromkeys(name for pairing in PAIRINGS.values() for name in pairing))


def public_name(embedding: str) -> str:
    """The name of an embedding in directions: text_audio -> text, audio_plus_text -> audio+text."""
    return "text" if embedding.startswith("text_") else embedding.replace("_plus_", "+")


# "query->gallery" -> (query embedding, gallery embedding): both directions of every pairing
DIRECTIONS: dict[str, tuple[str, str]] = {
    f"{public_name(query)}->{public_name(gallery)}": (query, gallery)
    for left, right in PAIRINGS.values()
    for query, gallery in ((left, right), (right, left))
}


@dataclass
class Ranked:
    """What one direction compared, and the ranks that came of it; all on the CPU.

    Queries and items are numbers of captions (rows of `texts`) where that side is text alone and `texts` was given, and
    else numbers of clips (rows of `embeds`).
    """

    queries: Tensor  # (Q,)
    items: Tensor  # (G,)
    target: Tensor  # (Q, M) which of the G items are true, padded with -1
    ranks: Tensor  # (Q,) 1-based, of the best true item
    units: Tensor  # (Q,) queries with the same number are of one clip, and are resampled together


def evaluate_embeddings(
    embeds: dict[str, Tensor],
    valid: dict[str, Tensor] | None = None,
    texts: dict[str, Tensor] | None = None,
    captions: Tensor | None = None,
    shared: bool = False,
    protocol: str = "dot",
    intervals: bool = False,
    ranked: dict[str, Ranked] | None = None,
    windows: EmbeddedWindows | None = None,
) -> dict[str, dict[str, float | int]]:
    """Retrieval in every direction of which both embeddings are given.

    Args:
        embeds: name (`EMBEDDINGS`) -> (N, D); row i of each belongs to clip i.
        valid: name -> (N,) bool, whether a clip has the embedding: only clips with both embeddings of a direction are
            queries and gallery. None, or a name that is missing: all clips have it.
        texts: name of an embedding of text alone -> (T, D), of all different captions. None: each clip has one caption,
            whose embeddings are in `embeds`.
        captions: with `texts`, (N, M) int64, which of the T texts are captions of each clip, padded with -1.
        shared: all ranks call this with the same arguments and share the work.
        protocol: dot | cosine | reweighted, as the head of this module says.
        intervals: also give 95 % intervals; the captions of a clip are resampled together.
        ranked: filled with what each direction compared, except by the protocol "reweighted".
        windows: those of the clips, by the best of which pairs are scored, except by the protocol "reweighted".
    Returns:
        direction, such as "text->audio" -> `retrieval_metrics`.
    Raises:
        ValueError: a name that no direction uses, or what `retrieval_ranks` raises, with the direction.
    """
    unknown = sorted(embeds.keys() - set(EMBEDDINGS))
    if unknown:
        raise ValueError(f"unknown embeddings {', '.join(unknown)}; known are {', '.join(EMBEDDINGS)}")
    if len({len(rows) for rows in embeds.values()}) > 1:
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in embeds.items())
        raise ValueError(f"embeddings of different numbers of clips: {counts}")
    metrics = {}
    for direction, (query, gallery) in DIRECTIONS.items():
        if query not in embeds or gallery not in embeds:
            continue
        rows = torch.ones(len(embeds[query]), dtype=torch.bool)
        for name in (query, gallery):
            if valid and name in valid:
                rows &= valid[name]
        if valid and not rows.any():
            continue
        queries, items, target = embeds[query][rows], embeds[gallery][rows], None
        query_numbers = item_numbers = rows.nonzero().flatten()
        query_copies = copies = None  # how many clips have a caption
        if texts and query in texts:
            query_numbers, _, target = _used_captions(captions[rows])
            queries, query_copies = texts[query][query_numbers], (target >= 0).sum(1)
        elif texts and gallery in texts:
            item_numbers, target, clips = _used_captions(captions[rows])
            items, copies = texts[gallery][item_numbers], (clips >= 0).sum(1)
        try:
            target = checked_target(queries, items, target)
            # a query that is a caption belongs to its clip, of several to the last; any other query is a clip
            units = target.amax(1) if query in (texts or ()) else torch.arange(len(queries), device=target.device)
            if protocol == "reweighted":
                row = _reweighted(queries, items, target, query_copies, copies, shared, units if intervals else None)
            else:
                cosine = protocol == "cosine"
                scores: DotProducts | BestWindows
                if windows is None:
                    scores = DotProducts(queries, items, cosine)
                else:
                    sides = ((query, queries, query_numbers), (gallery, items, item_numbers))
                    parts = [part for side in sides for part in windows_of(windows, texts or {}, *side)]
                    scores = BestWindows(*parts, cosine)
                ranks, row = _plain(scores, target, shared, units if intervals else None)
                if ranked is not None:
                    ranked[direction] = Ranked(query_numbers, item_numbers, target.cpu(), ranks.cpu(), units.cpu())
        except ValueError as error:
            raise ValueError(f"{direction}: {error}") from error
        metrics[direction] = row
    return metrics


def windows_of(
    windows: EmbeddedWindows, texts: Container[str], name: str, embeds: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """The windows of one side of a direction: (V, D), and (V,) which of its rows each is of.

    Args:
        texts: the names of which every row is a caption, and its own window.
        name: of the side.
        embeds: (R, D) its rows.
        numbers: (R,) ascending, the clips that they are of.
    """
    if name in texts:
        return embeds, torch.arange(len(embeds))
    place = torch.searchsorted(numbers, windows.clip).clamp(max=len(numbers) - 1)
    used = windows.valid[name] & (numbers[place] == windows.clip)
    return windows.embeds[name][used], place[used]


def _plain(
    scores: DotProducts | BestWindows, target: Tensor, shared: bool, units: Tensor | None
) -> tuple[Tensor, dict[str, float | int]]:
    """(Q,) ranks, and the figures that follow from them."""
    others = others_at_or_above(scores, target, best=10, shared=shared)
    counts = (distinct_targets(target) >= 0).sum(1)
    precisions = average_precision_at_10(others, counts)
    true_items = counts.sum().item() / len(counts)
    ranks = 1 + others[:, 0]
    return ranks, retrieval_metrics(ranks, scores.items, true_items, precisions, units)


def _reweighted(
    queries: Tensor,
    items: Tensor,
    target: Tensor,
    query_copies: Tensor | None,
    copies: Tensor | None,
    shared: bool,
    units: Tensor | None,
) -> dict[str, float | int]:
    """Without mAP@10, for which the rule has no order among equal captions."""
    query_copies = torch.ones(len(queries), dtype=torch.int64) if query_copies is None else query_copies
    copies = torch.ones(len(items), dtype=torch.int64) if copies is None else copies
    ranks = (
        1 + others_at_or_above(Reweighted(queries, items, query_copies, copies, shared), target, shared=shared)[:, 0]
    )
    query_copies, copies = query_copies.to(target.device), copies.to(target.device)
    true = distinct_targets(target)
    true_items = (
        (copies[true.clamp(min=0)] * (true >= 0)).sum(1) * query_copies
    ).sum().item() / query_copies.sum().item()
    units = None if units is None else units.repeat_interleave(query_copies)
    ranks = ranks.repeat_interleave(query_copies)
    row = retrieval_metrics(ranks, int(copies.sum()), true_items, units=units)
    for figures in (row, row.get("ci95", {})):
        figures.pop("mAP@10", None)
    return row


def _used_captions(captions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The captions of some clips, of which each is used at least once.

    Args:
        captions: (N, M) which of T texts are captions of each clip, padded with -1.
    Returns:
        (T',) which of the T texts are their captions, (N, M) which of the T' each clip has, and (T', M') which of the N
        clips have each; the last two padded with -1.
    """
    used, target = captions.unique(return_inverse=True)
    if used[0] < 0:
        used, target = used[1:], target - 1
    clip, caption = (target >= 0).nonzero(as_tuple=True)[0], target[target >= 0]
    order = caption.argsort(stable=True)
    clip, caption = clip[order], caption[order]
    counts = caption.bincount(minlength=len(used))
    clips = torch.full((len(used), int(counts.max())), -1)
    clips[caption, torch.arange(len(caption)) - (counts.cumsum(0) - counts)[caption]] = clip
    return used, target, clips
