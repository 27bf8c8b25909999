"""The clips of each batch, as a pure function of the seed, the epoch and the manifest."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from pe_av.config import ConfigError
from pe_av.data.mix import Mixture

POSITIONS_PER_SECOND = 25  # of the model's audio, which a token budget counts
# batches' worth of clips that are sorted by length at a time: many for little padding, few for lengths that mix
WINDOW = 64


class BatchSampler:
    """Chooses the clips of each batch.

    With shuffling, the clips of an epoch are permuted and taken by windows. Within a window they are sorted by what
    they have (audio, video, captions) and by length, cut into batches, and the batches are put in random order. So the
    rows of a batch are of similar length and allow the same pairings. The ranks share every batch.

    Without shuffling, the clips come in order and the ranks take whole batches in turn, so that each batch is computed
    as by one process alone.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        lengths: np.ndarray | None = None,
        modalities: np.ndarray | None = None,
        max_tokens: int | None = None,
        mixture: Mixture | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        """
        Args:
            size: number of clips.
            batch_size: rows of a batch, over all ranks.
            shuffle: a new order in every epoch and full batches only: less than a batch of clips is left out, others in
                every epoch. Otherwise every clip comes, and the last batch may be smaller.
            lengths: (N,) seconds of each clip, to batch clips of similar length.
            modalities: (N,) what each clip has, as `Manifest.modalities` says, to batch clips that have the same.
            max_tokens: the token budget, which replaces batch_size when shuffling: a batch, over all ranks, has as many
                rows as fit if each is padded to the longest, at 25 positions per second.
            mixture: how many clips of each data set an epoch takes when shuffling; None: every clip once.
            rank, world: this rank and the world size. When shuffling, a rank takes every world-th row of a batch, which
                may be none.
        Raises:
            ConfigError: there are fewer clips than a batch takes, or clips that are too long for max_tokens.
        """
        self.size, self.shuffle, self.seed, self.rank, self.world = size, shuffle, seed, rank, world
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.mixed = mixture is not None
        self.mixture = mixture or Mixture({"data": size}, {"data": 1.0})
        self.tokens = None if lengths is None else _tokens(lengths)
        self.modalities = None if modalities is None else modalities.astype(np.uint8)
        self.batches_per_step = 1 if shuffle else world  # over all ranks
        self.rows = batch_size
        if max_tokens is not None:
            if self.tokens is None:
                raise ConfigError(
                    "a token budget needs the length of every clip: python -m pe_av.data.manifest IN OUT finds them"
                )
            self.rows = max(max_tokens // int(np.median(self.tokens)), 1)  # roughly, for the size of a window
            least = 2 * self.tokens.max()
            if shuffle and least > max_tokens:
                raise ConfigError(f"{max_tokens} tokens do not hold two of the longest clips: give at least {least}")
        elif shuffle and size - len(self.mixture.sizes) + 1 < batch_size:
            raise ConfigError(f"{size} clips do not fill batch_size={batch_size}: lower it")

    def epoch(self, epoch: int, first: int = 0) -> Iterator[np.ndarray]:
        """For each step of an epoch the indices of this rank's clips, of which there may be none; every rank has as
        many steps. No clip is read, so resuming in the middle costs about a second for a million clips.

        Args:
            first: the batch, counted over all ranks, to begin with.
        """
        if self.shuffle:
            yield from (batch[self.rank :: self.world] for batch in islice(self._batches(epoch), first, None))
            return
        for begin in range(first * self.batch_size, self.size, self.world * self.batch_size):
            bounds = [min(begin + (self.rank + i) * self.batch_size, self.size) for i in (0, 1)]
            yield np.arange(*bounds, dtype=np.int32)

    def steps(self, epoch: int) -> int:
        """The number of steps in an epoch. With a token budget, counting them takes planning the whole epoch."""
        if not self.shuffle:
            return -(-self.size // (self.world * self.batch_size))
        if self.max_tokens is not None:
            return sum(1 for _ in self._batches(epoch))
        return sum(end - first for first, end in self.mixture.spans(epoch)) // self.batch_size

    def picks(self, epoch: int, clips: np.ndarray, batch: int = 0) -> list[int]:
        """For each clip a random number that chooses its caption in this epoch; 0 without shuffling.

        Args:
            batch: the number of the batch, which matters in a mixture, where a clip may come several times an epoch.
        """
        return [int(bits >> np.uint64(32)) for bits in self._random_bits(epoch, clips, batch)]

    def offsets(self, epoch: int, clips: np.ndarray, batch: int = 0) -> list[float]:
        """For each clip a random number in [0, 1), independent of its pick, that says where a crop of it begins."""
        return [int(bits & np.uint64(2**32 - 1)) / 2**32 for bits in self._random_bits(epoch, clips, batch)]

    def state_dict(self) -> dict[str, Any]:
        """What identifies the order of the clips: a loader resumes only with the same."""
        sets = self.mixture
        return {
            "clips": self.size,
            "seed": self.seed,
            "rows": self.batch_size if self.max_tokens is None else None,
            "tokens": self.max_tokens,
            "sets": [[name, size, sets.weights[name]] for name, size in sets.sizes.items()] if self.mixed else None,
            "sorting": self._sorting_checksum() if self.shuffle else None,
        }

    def _sorting_checksum(self) -> str:
        digest = hashlib.sha256()
        for values in (self.tokens, self.modalities):
            digest.update(b"none" if values is None else values.tobytes())
        return digest.hexdigest()[:16]

    def _random_bits(self, epoch: int, clips: np.ndarray, batch: int) -> np.ndarray:
        """(N,) uint64 from a hash (splitmix64), so that a clip's do not depend on its neighbours or on the ranks."""
        if not self.shuffle:
            return np.zeros(len(clips), np.uint64)
        turn = batch if self._may_repeat else 0
        start = (self.seed * 1_000_003 + epoch + 1) * 0x9E3779B97F4A7C15 + turn * 0xD1B54A32D192ED03
        x = clips.astype(np.uint64) + np.uint64(start % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    def _batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The batches of a shuffled epoch, over all ranks."""
        rng = np.random.default_rng((self.seed, epoch))
        order = self.mixture.clips(self.seed, epoch)
        rng.shuffle(order)
        rest = order[:0]
        for start in range(0, len(order), WINDOW * self.rows):
            batches, rest = self._cut(np.concatenate([rest, order[start : start + WINDOW * self.rows]]))
            yield from (batches[i] for i in rng.permutation(len(batches)))
        if self.max_tokens is not None and len(rest) >= 2:
            most_rows = self.max_tokens // int(self.tokens[rest].max())
            fewest = -(-len(rest) // most_rows)
            yield from (batch for batch in _deal(rest, max(fewest, self._repeats(rest))) if len(batch) >= 2)

    def _cut(self, clips: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Full batches of similar clips, and the clips that remain for the next window."""
        repeats = self._repeats(clips)
        if self.max_tokens is None:
            # the remaining clips are taken off before sorting: otherwise they would always be the longest
            count = len(clips) // self.rows
            clips, rest = np.split(clips, [count * self.rows])
            groups = np.array_split(self._sorted(clips).reshape(count, self.rows), max(count // repeats, 1))
            return [batch for group in groups for batch in _deal(group.ravel(), len(group))], rest
        clips = self._sorted(clips)
        tokens, batches, first = self.tokens[clips], [], 0
        while first < len(clips):
            most = self.max_tokens // int(tokens[first]) * repeats  # clips, if all were as short as the first
            longest = np.maximum.accumulate(tokens[first : first + most + 1])
            full = np.flatnonzero(np.arange(len(longest)) >= self.max_tokens // longest * repeats)
            if not len(full):
                break
            batches += _deal(clips[first : first + full[0]], repeats)
            first += full[0]
        return batches, clips[first:]

    def _sorted(self, clips: np.ndarray) -> np.ndarray:
        keys = [values[clips] for values in (self.tokens, self.modalities) if values is not None]
        if self._may_repeat:
            keys.insert(0, clips)  # the least significant key puts the copies of a clip side by side
        return clips[np.lexsort(keys)] if keys else clips

    def _repeats(self, clips: np.ndarray) -> int:
        """How often the most frequent clip occurs."""
        return int(np.unique(clips, return_counts=True)[1].max()) if self._may_repeat and len(clips) else 1

    @property
    def _may_repeat(self) -> bool:
        return len(self.mixture.sizes) > 1


def _tokens(lengths: np.ndarray) -> np.ndarray:
    """(N,) seconds -> (N,) int32 positions, with no more memory than one copy, as there may be many millions."""
    tokens = lengths * POSITIONS_PER_SECOND
    np.ceil(tokens, out=tokens)
    return np.maximum(tokens, 1, out=tokens).astype(np.int32)


def _deal(clips: np.ndarray, count: int) -> list[np.ndarray]:
    """Sorted clips -> `count` batches, dealt like cards, so that a clip that occurs `count` times is in none twice: its
    copies are side by side, and within a batch each would be a wrong answer for the other."""
    return [clips[i::count] for i in range(count)]
