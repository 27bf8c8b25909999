"""Zero-shot retrieval: the rank of every query's true item in a gallery, and the recalls that follow from the ranks.

A clip may have several captions, and a caption several clips. Every different caption is in the gallery once and is a
query once, and the rank of a query is that of the best of its true items. So five captions per clip are evaluated as is
usual, and where the captions are labels, R@1 of audio->text is the accuracy of zero-shot classification.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pe_av.config import PAIRINGS
from pe_av.ranks import rank, world_size

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


@torch.no_grad()
def retrieval_ranks(
    queries: Tensor, gallery: Tensor, target: Tensor | None = None, chunk: int = 1024, shared: bool = False
) -> Tensor:
    """The 1-based rank of each query's true item in the gallery, sorted by dot product.

    Items with the score of the true one are ranked before it, so that a collapsed model, which gives all items the same
    embedding, gets the last rank and not the first.

    Args:
        queries: (Q, D), any floating type and device.
        gallery: (G, D), on the same device.
        target: (Q,) index in the gallery of each query's true item, or (Q, M), padded with -1, of its true items: the
            rank is that of the best of them among the other items. None: item i is true for query i.
        chunk: queries scored at a time; memory grows with chunk × G, not with Q × G.
        shared: all ranks call this with the same arguments and share the chunks.
    Returns:
        (Q,) int64 ranks, 1 … G.
    Raises:
        ValueError: embeddings are not finite, shapes do not match, or a target is outside the gallery.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and gallery {tuple(gallery.shape)} are not (Q, D) and (G, D)")
    for side, embeds in (("queries", queries), ("gallery", gallery)):
        bad = (~embeds.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{side}: {len(bad)} of {len(embeds)} embeddings are NaN or infinite, first at row {bad[0]}"
            )
    if target is None:
        if len(queries) != len(gallery):
            raise ValueError(f"{len(queries)} queries for {len(gallery)} gallery items need a target for each query")
        target = torch.arange(len(queries))
    elif target.ndim not in (1, 2) or target.shape[:1] != queries.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)} is not (Q,) or (Q, M), with Q = {len(queries)} queries")
    if not len(queries):
        return torch.empty(0, dtype=torch.int64, device=queries.device)
    target = target.to(queries.device, torch.int64).reshape(len(queries), -1)
    any_true = target.amax(1, keepdim=True)  # one true item of each query, which takes the place of the padding
    if int(any_true.min()) < 0 or int(any_true.max()) >= len(gallery) or int(target.min()) < -1:
        raise ValueError(f"target holds {int(target.min())} … {int(target.max())}, outside 0 … {len(gallery) - 1}")
    target = target.where(target >= 0, any_true)

    # float64: autocast and TF32 do not touch it, and rounding can only reorder scores that agree to 15 digits
    queries = queries.double()
    # each distinct item is scored once, since a matrix product may round equal columns differently and they must tie
    distinct, item = gallery.double().unique(dim=0, return_inverse=True)
    ranks = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    starts = range(0, len(queries), chunk)
    for start in starts[rank() :: world_size()] if shared else starts:
        rows = slice(start, start + chunk)
        scores = (queries[rows] @ distinct.T)[:, item]  # (chunk, G)
        best = scores.gather(1, target[rows]).amax(1, keepdim=True)
        scores.scatter_(1, target[rows], -torch.inf)
        ranks[rows] = 1 + (scores >= best).sum(1)
    if shared and world_size() > 1:
        dist.all_reduce(ranks)  # each query's rank is zero except on the process that has computed it
    return ranks


def retrieval_metrics(ranks: Tensor, gallery_size: int, true_items: float = 1.0) -> dict[str, float | int]:
    """The figures of one direction, as plain numbers for JSON.

    Args:
        ranks: (Q,) 1-based ranks, at least one.
        gallery_size: number of items that each query was compared with.
        true_items: how many of them are true for a query, on average.
    Returns:
        R@1, R@5, R@10 (percent of queries with a true item among the first k), chance (R@1 of a guess), MedR and MeanR
        (median and mean rank), MRR (mean of 1 / rank), queries and gallery (their numbers).
    Raises:
        ValueError: there are no ranks, or one is outside 1 … gallery_size.
    """
    values = ranks.cpu().numpy()
    if not len(values):
        raise ValueError("no ranks: a direction without queries has no recall")
    if not 1 <= values.min() <= values.max() <= gallery_size:
        raise ValueError(f"ranks {values.min()} … {values.max()} are outside 1 … {gallery_size}, the gallery's size")
    recalls = {f"R@{k}": 100 * float((values <= k).mean()) for k in (1, 5, 10)}
    return recalls | {
        "chance": 100 * true_items / gallery_size,
        "MedR": float(np.median(values)),
        "MeanR": float(values.mean()),
        "MRR": float((1 / values).mean()),
        "queries": len(values),
        "gallery": gallery_size,
    }


def evaluate_embeddings(
    embeds: dict[str, Tensor],
    valid: dict[str, Tensor] | None = None,
    texts: dict[str, Tensor] | None = None,
    captions: Tensor | None = None,
    shared: bool = False,
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
        if texts and query in texts:
            queries, _, target = _used_captions(texts[query], captions[rows])
        elif texts and gallery in texts:
            items, target, _ = _used_captions(texts[gallery], captions[rows])
        try:
            ranks = retrieval_ranks(queries, items, target, shared=shared)
        except ValueError as error:
            raise ValueError(f"{direction}: {error}") from error
        true_items = 1.0 if target is None else (target >= 0).sum().item() / len(target)
        metrics[direction] = retrieval_metrics(ranks, len(items), true_items)
    return metrics


def _used_captions(texts: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The captions of some clips, of which each is used at least once.

    Args:
        texts: (T, D) of all captions.
        captions: (N, M) which of the T texts are captions of each clip, padded with -1.
    Returns:
        (T', D) of the captions that these clips have, (N, M) which of the T' each clip has, and (T', M') which of the
        N clips have each; the last two padded with -1.
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
    return texts[used], target, clips
