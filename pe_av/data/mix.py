"""Several data sets in one run, each with its share of the clips.

The clips of a set are an endless stream: pass after pass through all of them, each in an order of its own. An epoch
takes from each stream, in proportion to its weight, what follows on the epoch before. So a small set is repeated and a
large one comes completely before any of its clips repeats, whatever the weights, and what an epoch consists of is a
pure function of seed and epoch.
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
    """How many clips the sets have, and in which proportion an epoch takes of them; their clips are numbered through.

    Raises:
        ConfigError: no set, one without clips, or a weight that is not positive.
    """

    sizes: Mapping[str, int]  # set -> clips
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ConfigError("data.mix names no data set: give it at least one, or set data.train")
        for name, size in self.sizes.items():
            weight = self.weights[name]
            if not size:
                raise ConfigError(f"data.mix.{name} holds no clips")
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(f"data.mix.{name}: weight={weight} is not positive; leave out what shall not come")

    def spans(self, epoch: int) -> list[tuple[int, int]]:
        """(first, end) of the positions in the stream of each set that this epoch takes.

        All of them together are as many as there are clips, up to one for each set, since each is rounded down.
        """
        # exact, so that epochs join without a gap and a share is what it says after any number of them
        total, weights = sum(self.sizes.values()), [Fraction(self.weights[name]) for name in self.sizes]
        ends = [total * weight / sum(weights) for weight in weights]
        return [(math.floor(epoch * end), math.floor((epoch + 1) * end)) for end in ends]

    def clips(self, seed: int, epoch: int) -> np.ndarray:
        """(clips of this epoch,) int32, by sets; a clip that comes several times stands there as often."""
        pieces, offset = [], 0
        for number, (size, (first, end)) in enumerate(zip(self.sizes.values(), self.spans(epoch), strict=True), 1):
            for turn in range(first // size, -(-end // size)):
                part = slice(max(first - turn * size, 0), min(end - turn * size, size))
                taken = np.arange(offset, offset + size, dtype=np.int32)
                if part != slice(0, size):  # which clips are in it needs the order of the pass
                    # numbers start at 1: (seed, epoch, 0) is the same seed as the (seed, epoch) of the sampler
                    np.random.default_rng((seed, turn, number)).shuffle(taken)
                pieces.append(taken[part])
            offset += size
        return np.concatenate(pieces)


class MixedManifest(Sequence[Clip]):
    """The clips of several manifests one after the other, of which each bears the name of its set: "name/id"."""

    def __init__(self, manifests: Mapping[str, Manifest], weights: Mapping[str, float]):
        """
        Args:
            manifests: name of a set -> its clips.
            weights: name -> how much of an epoch is of it, in proportion to the others.
        Raises:
            ConfigError: a name or weight that cannot be used.
        """
        for name in manifests:
            if not name or "/" in name:
                raise ConfigError(f"data.mix: {name!r} cannot be a name; it is put before the clips' ids, with a slash")
        self.manifests = dict(manifests)
        self.mixture = Mixture({name: len(clips) for name, clips in manifests.items()}, dict(weights))
        self._ends = list(accumulate(self.mixture.sizes.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Clip:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        place = bisect_right(self._ends, index)
        name, manifest = list(self.manifests.items())[place]
        clip = manifest[index - self._ends[place] + len(manifest)]
        return replace(clip, id=f"{name}/{clip.id}")

    def texts(self) -> Iterator[str]:
        """All captions of all kinds."""
        for manifest in self.manifests.values():
            yield from manifest.texts()

    def lengths(self, max_seconds: float) -> np.ndarray | None:
        """(N,) seconds that each clip lasts, `max_seconds` at most; None where a manifest does not say of all."""
        found = [manifest.lengths(max_seconds) for manifest in self.manifests.values()]
        return None if any(lengths is None for lengths in found) else np.concatenate(found)

    def modalities(self) -> np.ndarray:
        """(N,) which of sound (4), picture (2) and captions (1) each clip has."""
        return np.concatenate([manifest.modalities() for manifest in self.manifests.values()])

    def kinds(self) -> dict[str | None, np.ndarray]:
        """Kind of caption -> (N,) whether each clip has one of that kind."""
        found = [manifest.kinds() for manifest in self.manifests.values()]
        return {kind: np.concatenate([kinds[kind] for kinds in found]) for kind in found[0]}


def read_mix(sets: Mapping[str, MixConfig]) -> MixedManifest:
    """The manifests that `data.mix` names.

    Raises:
        ConfigError: one that cannot be read, or a name or weight that cannot be used.
    """
    manifests = {name: read_manifest(one.train, one.split) for name, one in sets.items()}
    return MixedManifest(manifests, {name: one.weight for name, one in sets.items()})
