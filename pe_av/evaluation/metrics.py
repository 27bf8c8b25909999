"""Zero-shot retrieval: the rank of every query's true item in a gallery, and the recalls that follow from the ranks."""

import numpy as np
import torch
from torch import Tensor

from pe_av.config import PAIRINGS

EMBEDDINGS = tuple(dict.fromkeys(name for pairing in PAIRINGS.values() for name in pairing))


def public_name(embedding: str) -> str:
    """What a reader calls an embedding: text_audio -> text, audio_plus_text -> audio+text."""
    return "text" if embedding.startswith("text_") else embedding.replace("_plus_", "+")


# "query->gallery" -> (query embedding, gallery embedding): every pairing, there and back
DIRECTIONS: dict[str, tuple[str, str]] = {
    f"{public_name(query)}->{public_name(gallery)}": (query, gallery)
    for left, right in PAIRINGS.values()
    for query, gallery in ((left, right), (right, left))
}


@torch.no_grad()
def retrieval_ranks(queries: Tensor, gallery: Tensor, target: Tensor | None = None, chunk: int = 1024) -> Tensor:
    """1-based rank of each query's true item when the gallery is sorted by dot product, ties lost.

    Every other item that scores as high as the true one is ranked before it, so that a collapsed model, which gives
    all items one embedding, gets the last rank and not the first. Two captions that are equal word for word tie too.

    Args:
        queries: (Q, D), any floating type and device.
        gallery: (G, D), on the same device.
        target: (Q,) index of each query's true item in the gallery; None: item i belongs to query i.
        chunk: queries scored at a time; memory grows with chunk × G, never with Q × G.
    Returns:
        (Q,) int64 ranks, 1 … G.
    Raises:
        ValueError: embeddings that are not finite, shapes that do not fit, or a target outside the gallery.
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
    elif target.shape != queries.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)} is not ({len(queries)},), one index per query")
    elif len(target) and not 0 <= int(target.min()) <= int(target.max()) < len(gallery):
        raise ValueError(f"target holds {int(target.min())} … {int(target.max())}, outside 0 … {len(gallery) - 1}")
    target = target.to(queries.device, torch.int64)

    # float64, because autocast and TF32 leave it alone, and rounding then orders only what is equal to 15 digits
    queries = queries.double()
    # each distinct item is scored once: a matrix product may round equal columns differently, and they must tie
    distinct, item = gallery.double().unique(dim=0, return_inverse=True)
    ranks = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        scores = (queries[rows] @ distinct.T)[:, item]  # (chunk, G)
        true = scores.gather(1, target[rows, None])  # (chunk, 1)
        ranks[rows] = (scores >= true).sum(1)
    return ranks


def retrieval_metrics(ranks: Tensor, gallery_size: int) -> dict[str, float | int]:
    """What is reported about the ranks of one direction.

    Args:
        ranks: (Q,) 1-based ranks, at least one.
        gallery_size: items that each query was compared with.
    Returns:
        R@1, R@5, R@10 (percent of queries whose item is among the first k), MedR and MeanR (median and mean rank),
        MRR (mean of 1 / rank), queries and gallery (how many); plain numbers, ready for JSON.
    Raises:
        ValueError: no ranks, or one outside 1 … gallery_size.
    """
    values = ranks.cpu().numpy()
    if not len(values):
        raise ValueError("no ranks: a direction without queries has no recall")
    if not 1 <= values.min() <= values.max() <= gallery_size:
        raise ValueError(f"ranks {values.min()} … {values.max()} are outside 1 … {gallery_size}, the gallery's size")
    recalls = {f"R@{k}": 100 * float((values <= k).mean()) for k in (1, 5, 10)}
    return recalls | {
        "MedR": float(np.median(values)),
        "MeanR": float(values.mean()),
        "MRR": float((1 / values).mean()),
        "queries": len(values),
        "gallery": gallery_size,
    }


def evaluate_embeddings(
    embeds: dict[str, Tensor], valid: dict[str, Tensor] | None = None
) -> dict[str, dict[str, float | int]]:
    """Retrieval in every direction whose two sides are there.

    Args:
        embeds: (N, D) by name (`EMBEDDINGS`); row i of each belongs to clip i.
        valid: name -> (N,) bool, False where a clip has no such embedding: in a direction only clips that have both
            sides are queries and gallery. None, or not named: all have it.
    Returns:
        direction, e.g. "text->audio", -> `retrieval_metrics`.
    Raises:
        ValueError: a name that no direction uses, or what `retrieval_ranks` refuses, naming the direction.
    """
    unknown = sorted(embeds.keys() - set(EMBEDDINGS))
    if unknown:
        raise ValueError(f"unknown embeddings {', '.join(unknown)}; known are {', '.join(EMBEDDINGS)}")
    metrics = {}
    for direction, (query, gallery) in DIRECTIONS.items():
        if query in embeds and gallery in embeds:
            sides = embeds[query], embeds[gallery]
            flags = [valid[name] for name in (query, gallery) if valid and name in valid]
            if flags:
                both = torch.stack(flags).all(0)
                if not both.any():
                    continue
                sides = tuple(side[both] for side in sides)
            try:
                ranks = retrieval_ranks(*sides)
            except ValueError as error:
                raise ValueError(f"{direction}: {error}") from error
            metrics[direction] = retrieval_metrics(ranks, len(ranks))
    return metrics
