"""The rows of an index that answer queries best: exactly, a block at a time, or about so by faiss.

    python -m pe_av.nearest INDEX EMBEDDING…

makes the approximate index of these embeddings, such as audio_video, which takes minutes for a million rows. From there
on, `python -m pe_av.search … --approximate` looks only at the rows near a query, and scores those exactly.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from pe_av.config import ConfigError
from pe_av.index import Index

BLOCK_ROWS = 2**14  # that faiss sorts into its lists at a time
BLOCK_SCORES = 2**16  # of all queries, that are computed at a time
CANDIDATES = 20  # rows that faiss finds are this many times those that are asked for
PROBED = 64  # of its lists that faiss looks into
SAMPLE = 40  # rows for each list that faiss learns the lists from


def nearest(
    index: Index, name: str, queries: np.ndarray, top: int, allowed: np.ndarray | None = None, cosine: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The rows with the highest dot products.

    Args:
        name: the embedding that is searched; rows without it are never found.
        queries: (Q, D) float32.
        allowed: (N,) bool, the rows that may be found; None: all.
        cosine: score by the cosine instead of the dot product.
    Returns:
        (scores, rows), each (Q, up to `top`), the best first, equal scores in the order of the rows. There are fewer
        than `top` if the index has fewer that may be found.
    Raises:
        ConfigError: the index does not have the embedding, or another width.
    """
    _check_width(index, name, queries)
    asked = np.ascontiguousarray(queries, np.float32)
    asked = asked / np.linalg.norm(asked, axis=1, keepdims=True).clip(1e-12) if cosine else asked
    best = [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(asked)
    for first, values, has in index.blocks(name, max(BLOCK_SCORES // len(asked), 1024)):
        if allowed is not None:
            has = has & allowed[first : first + len(has)]
        # one query is a product of matrix and vector, which reads the block once
        scores = (values @ asked[0])[None] if len(asked) == 1 else asked @ values.T
        if cosine:
            scores /= np.linalg.norm(values, axis=1).clip(1e-12)
        if not has.all():
            scores[:, ~has] = -np.inf
        for query, (known, rows) in enumerate(best):
            better = np.flatnonzero(scores[query] > (known[-1] if len(known) == top else -np.inf))
            if len(better):
                known, rows = np.append(known, scores[query, better]), np.append(rows, first + better)
                order = np.argsort(-known, kind="stable")[:top]
                best[query] = known[order], rows[order]
    return np.stack([known for known, _ in best]), np.stack([rows for _, rows in best])


def approximate_path(index: Index, name: str) -> Path:
    return index.folder / f"{name}.faiss"


def make_approximate(index: Index, name: str) -> Path:
    """Write the approximate index of an embedding: inverted lists (IVF) of vectors in 8 bits per value.

    Raises:
        ConfigError: faiss is not installed, the index is not finished, or too few rows have the embedding.
    """
    faiss = _faiss()
    width, rows = index.record["embeddings"][name], index.count(name)
    lists = 4 * int(rows**0.5)
    if index.missing:
        raise ConfigError(
            f"{index.folder}: {index.missing} parts are missing; finish it with python -m pe_av.embed first"
        )
    if rows < SAMPLE * 4:
        raise ConfigError(f"{index.folder}: only {rows} rows have {name}, which are searched faster without faiss")
    made = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    step = max(rows // (SAMPLE * lists), 1)
    sample = [values[has][::step] for _, values, has in index.blocks(name, BLOCK_ROWS)]
    made.train(np.concatenate(sample))
    blocks = list(index.blocks(name, BLOCK_ROWS))
    for first, values, has in track(blocks, name, console=Console(stderr=True)):
        made.add_with_ids(values[has], first + np.flatnonzero(has))
    path = approximate_path(index, name)
    faiss.write_index(made, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    return path


def nearest_approximately(
    index: Index, name: str, queries: np.ndarray, top: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `nearest`, but among the rows that faiss takes for the nearest. Where at most a tenth of the rows is allowed,
    or where faiss finds too few, the search is exact.

    Raises:
        ConfigError: there is no approximate index of this embedding, or it was made of another state of the index.
    """
    _check_width(index, name, queries)
    faiss, path = _faiss(), approximate_path(index, name)
    if not path.exists():
        raise ConfigError(f"{path}: no such file; python -m pe_av.nearest {index.folder} {name} makes it")
    made = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    if made.d != queries.shape[1] or made.ntotal != index.count(name) or index.missing:
        raise ConfigError(f"{path}: made of another state of the index; python -m pe_av.nearest makes it again")
    possible = made.ntotal if allowed is None else int(allowed.sum())
    if allowed is not None and possible * 10 <= len(index):
        return nearest(index, name, queries, top, allowed)
    settings: dict[str, Any] = {"nprobe": PROBED}
    if allowed is not None:
        settings["sel"] = faiss.IDSelectorBatch(np.flatnonzero(allowed))
    queries = np.ascontiguousarray(queries, np.float32)
    _, found = made.search(queries, top * CANDIDATES, params=faiss.SearchParametersIVF(**settings))
    top = min(top, possible)
    scores, rows = np.empty((len(queries), top), np.float32), np.empty((len(queries), top), np.int64)
    for query, candidates in enumerate(found):
        candidates = np.sort(candidates[candidates >= 0])
        if len(candidates) < top:
            return nearest(index, name, queries, top, allowed)
        exact = index.vectors(name, candidates) @ queries[query]
        order = np.argsort(-exact, kind="stable")[:top]
        scores[query], rows[query] = exact[order], candidates[order]
    return scores, rows


def _check_width(index: Index, name: str, queries: np.ndarray) -> None:
    width = index.record["embeddings"].get(name)
    if width is not None and width != queries.shape[1]:
        raise ConfigError(f"{index.folder}: its {name} embeddings are {width} wide, the queries {queries.shape[1]}")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError("approximate search needs faiss: pip install 'pe-av[search]'") from None
    return faiss


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.nearest INDEX EMBEDDING…"""
    if len(arguments) < 2:
        sys.exit(f"usage: {main.__doc__}")
    try:
        index = Index(arguments[0])
        for name in arguments[1:]:
            index.check(name)
        for name in arguments[1:]:
            print(make_approximate(index, name))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
