"""Which pairings a corpus allows to train, and their short names in a line of progress."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console

from pe_av.config import HEADS, ConfigError, Pairing
from pe_av.data.manifest import Manifest, Modality
from pe_av.evaluation.metrics import public_name
from pe_av.loading.batch import SUBSTITUTES, fits_embedding


def trainable_pairings(pairings: Sequence[Pairing], clips: Manifest, console: Console) -> list[Pairing]:
    """The pairings of which at least two clips have both sides; prints which others are left out.

    Raises:
        ConfigError: no pairing with a weight is left.
    """
    modalities, kinds = clips.modalities(), clips.kinds()
    media = {"audio": modalities & Modality.AUDIO > 0, "video": modalities & Modality.VIDEO > 0}
    kept, left_out = [], []
    for pairing in pairings:
        has_both = np.ones(len(modalities), dtype=bool)
        for side in (pairing.left, pairing.right):
            for tower in HEADS[side]:
                has_both &= media.get(tower, True)
            if "text" in HEADS[side]:
                has_both &= _has_caption(side, pairing.caption, kinds)
        (kept if has_both.sum() >= 2 else left_out).append(pairing)
    if not any(pairing.weight for pairing in kept):
        has = media | {"captions": modalities & Modality.TEXT > 0}
        present = [name for name, flags in has.items() if flags.any()]
        raise ConfigError(
            f"loss: none of {', '.join(p.name for p in pairings if p.weight)} can be trained: the clips have "
            f"{' and '.join(present)}, and no two clips have both sides of a pairing: add clips that do, or choose "
            "other pairings or weights"
        )
    if left_out:
        names = ", ".join(pairing.name for pairing in left_out)
        console.print(f"left out, since the clips do not have both sides: {names}", soft_wrap=True)
    return kept


def _has_caption(side: str, kind: str | None, kinds: Mapping[str | None, np.ndarray]) -> np.ndarray:
    """(N,) whether `Collate` finds a caption of each clip that can stand for `kind` in the embedding `side`.

    Args:
        kinds: own kind of a caption -> (N,) whether the clip has one.
    """
    has = np.zeros(len(kinds[None]), dtype=bool)
    chosen = np.zeros_like(has)  # clips for which a better substitute was chosen already
    for own in SUBSTITUTES[kind]:
        if fits_embedding(own, side, kind):
            has |= kinds[own] & ~chosen
        chosen |= kinds[own]
    return has


def short_name(pairing: Pairing) -> str:
    """audio_plus_text with video -> "a+t·v"; the kind of its caption, if it has one, as "@v" or "@av"."""
    sides = (public_name(side).replace("_", "+").split("+") for side in (pairing.left, pairing.right))
    short = "·".join("+".join(word[0] for word in side) for side in sides)
    return short if pairing.caption is None else f"{short}@{''.join(word[0] for word in pairing.caption.split('_'))}"
