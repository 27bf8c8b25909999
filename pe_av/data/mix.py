"""Several data sets in one run, each with its share of the clips.

Each set is an endless stream: pass after pass through all its clips, every pass in a new order. An epoch takes from
each stream a share in proportion to its weight, and goes on where the epoch before stopped. So a small set is repeated,
but no clip of any set is repeated before all of them have been used, and what an epoch consists of is a pure function
of the seed and the number of the epoch.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

import numpy as np

from pe_av.config import ConfigError, MixConfig
from pe_av.data.manifest import Clip, Manifest, read_manifest


@dataclass(frozen=True)
class Mixture:
    """The sizes and weights of the sets; their clips are numbered consecutively, one set after the other.

    Raises:
        ConfigError: no set, a set without clips, or a weight that is not positive.
    """

    sizes: Mapping[str, int]  # set -> number of clips
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ConfigError("data.mix names no data set: give it at least one, or set data.train")
        for name, size in self.sizes.items():
            weight = self.weights[name]
            if not size:
                raise ConfigError(f"data.mix.{name} holds no clips")
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(f"data.mix.{name}: weight={weight} is not positive; remove a set that is not wanted")

    def spans(self, epoch: int) -> list[tuple[int, int]]:
        """(first, end) of the positions in each set's stream that this epoch takes.

        Together they are as many as there are clips, or up to one fewer per set, because each is rounded down.
        """
        # exact fractions, so that epochs join without a gap and the shares stay exact over any number of epochs
        total, weights = sum(self.sizes.values()), [Fraction(self.weights[name]) for name in self.sizes]
        shares = [total * weight / sum(weights) for weight in weights]
        return [(math.floor(epoch * share), math.floor((epoch + 1) * share)) for share in shares]

    def clips(self, seed: int, epoch: int) -> np.ndarray:
        """(clips of this epoch,) int32 numbers, set by set; a clip that is drawn several times appears as often."""
        pieces, offset = [], 0
        for number, (size, (first, end)) in enumerate(zip(self.sizes.values(), self.spans(epoch), strict=True), 1):
            for turn in range(first // size, -(-end // size)):
                taken = slice(max(first - turn * size, 0), min(end - turn * size, size))
                clips = np.arange(offset, offset + size, dtype=np.int32)
                if taken != slice(0, size):  # only for an incomplete pass does the order matter
                    # numbers start at 1, because (seed, epoch, 0) would be the same seed as the sampler's (seed, epoch)
                    np.random.default_rng((seed, turn, number)).shuffle(clips)
                pieces.append(clips[taken])
            offset += size
        return np.concatenate(pieces)


class MixedManifest(Sequence[Clip]):
    """The clips of several manifests, one after the other; the name of the set precedes each id: "name/id"."""

    def __init__(self, manifests: Mapping[str, Manifest], weights: Mapping[str, float]):
        """
        Args:
            manifests: name of a set -> its clips.
            weights: name of a set -> its share of an epoch, in proportion to the other weights.
        Raises:
            ConfigError: a name or weight that cannot be used.
        """
        for name in manifests:
            if not name or "/" in name:
                raise ConfigError(f"data.mix: {name!r} cannot be a name; it precedes the clips' ids, with a slash")
        self.manifests = dict(manifests)
        self.mixture = Mixture({name: len(clips) for name, clips in manifests.items()}, dict(weights))
        self._ends = list(accumulate(self.mixture.sizes.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Clip:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._ends, index)
        name, manifest = list(self.manifests.items())[number]
        clip = manifest[index - self._ends[number] + len(manifest)]
        return replace(clip, id=f"{name}/{clip.id}")

    def texts(self) -> Iterator[str]:
        """All captions of all kinds."""
        for manifest in self.manifests.values():
            yield from manifest.texts()

    def lengths(self, max_seconds: float) -> np.ndarray | None:
        """(N,) seconds, as `Manifest.lengths`; None if one of the manifests knows no lengths."""
        lengths = [manifest.lengths(max_seconds) for manifest in self.manifests.values()]
        return None if any(one is None for one in lengths) else np.concatenate(lengths)

    def modalities(self) -> np.ndarray:
        """(N,) bits of `Modality`, what each clip has."""
        return np.concatenate([manifest.modalities() for manifest in self.manifests.values()])

    def kinds(self) -> dict[str | None, np.ndarray]:
        """Kind of caption -> (N,) bool, which clips have captions of that kind."""
        kinds = [manifest.kinds() for manifest in self.manifests.values()]
        return {kind: np.concatenate([one[kind] for one in kinds]) for kind in kinds[0]}


def read_mix(sets: Mapping[str, MixConfig]) -> MixedManifest:
    """The manifests that `data.mix` names.

    Raises:
        ConfigError: a manifest that cannot be read, or a name or weight that cannot be used.
    """
    manifests = {name: read_manifest(one.train, one.split) for name, one in sets.items()}
    return MixedManifest(manifests, {name: one.weight for name, one in sets.items()})
