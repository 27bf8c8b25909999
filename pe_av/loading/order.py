"""Which clips make up each batch, as a pure function of the seed, the epoch and the manifest."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from pe_av.config import ConfigError
from pe_av.data.mix import Mixture

TOKENS_PER_SECOND = 25  # positions that the model has for a second of sound


WINDOW = 64  # batches' worth of clips that are sorted by length at a time: large enough for little padding, small


class BatchSampler:
    """Which clips make up each batch.

    In an epoch with shuffling, the clips are permuted, taken by windows, and within a window sorted by what they have
    (sound, picture, captions) and by length; the batches cut from it come in random order. So the rows of a batch are
    of like length and pair the same things. The ranks share every batch.

    Without, the clips come in order, and the ranks take whole batches in turn, so that each is computed as one process
    alone would.
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
            size: clips that there are.
            batch_size: rows of a batch, of all ranks together.
            shuffle: in a new order every epoch, in which every batch is full: up to a batch of clips, other ones every
                epoch, is left out. Else all of them, the last batch with what is left.
            lengths: (N,) seconds of each clip, to put like to like.
            modalities: (N,) what each clip has (`Manifest.modalities`), likewise.
            max_tokens: with shuffling, instead of batch_size: as many rows, of all ranks together, as fit if each is
                padded to the longest; 25 tokens per second.
            mixture: with shuffling, what an epoch takes of which set; None: every clip once.
            rank, world: this process and how many there are. With shuffling its rows of a batch are every world-th,
                which may be none.
        Raises:
            ConfigError: fewer clips than one batch takes, or a clip longer than max_tokens allows.
        """
        self.size, self.shuffle, self.seed, self.rank, self.world = size, shuffle, seed, rank, world
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.mixed = mixture is not None
        self.mixture = mixture or Mixture({"data": size}, {"data": 1.0})
        self.tokens = None if lengths is None else _tokens(lengths)
        self.modalities = None if modalities is None else modalities.astype(np.uint8)
        self.batches_per_step = 1 if shuffle else world
        self.rows = batch_size
        if max_tokens is not None:
            if self.tokens is None:
                raise ConfigError(
                    "a token budget needs the length of every clip: python -m pe_av.data.manifest IN OUT finds them"
                )
            self.rows = max(max_tokens // int(np.median(self.tokens)), 1)  # about, for the windows
            least = 2 * self.tokens.max()
            if shuffle and least > max_tokens:
                raise ConfigError(f"{max_tokens} tokens do not hold two of the longest clips: give at least {least}")
        elif shuffle and size - len(self.mixture.sizes) + 1 < batch_size:
            raise ConfigError(f"{size} clips do not fill batch_size={batch_size}: lower it")

    def epoch(self, number: int, first: int = 0) -> Iterator[np.ndarray]:
        """The clips of this rank in every step of epoch `number`, from whole batch `first` on; they may be none.

        All ranks have as many steps. Without reading anything, so that going on in the middle costs no more than the
        plan of the epoch: about a second for a million clips.
        """
        if self.shuffle:
            yield from (batch[self.rank :: self.world] for batch in islice(self._batches(number), first, None))
            return
        for begin in range(first * self.batch_size, self.size, self.world * self.batch_size):
            bounds = [min(begin + (self.rank + i) * self.batch_size, self.size) for i in (0, 1)]
            yield np.arange(*bounds, dtype=np.int32)

    def steps(self, number: int) -> int:
        """How many there are in an epoch; for a token budget the whole plan is made to count them."""
        if not self.shuffle:
            return -(-self.size // (self.world * self.batch_size))
        if self.max_tokens is not None:
            return sum(1 for _ in self._batches(number))
        return sum(end - first for first, end in self.mixture.spans(number)) // self.batch_size

    def picks(self, number: int, clips: np.ndarray, batch: int = 0) -> list[int]:
        """For each clip a number that decides which of its captions it shows in this epoch; 0 without shuffling.

        Args:
            batch: the whole batch, which matters in a mixture, where a clip may come several times in an epoch.
        """
        return [int(bits >> np.uint64(32)) for bits in self._chance(number, clips, batch)]

    def offsets(self, number: int, clips: np.ndarray, batch: int = 0) -> list[float]:
        """As `picks`, and independent of it: in [0, 1), which part of each clip is read in this epoch."""
        return [int(bits & np.uint64(2**32 - 1)) / 2**32 for bits in self._chance(number, clips, batch)]

    def state_dict(self) -> dict[str, Any]:
        """What identifies the stream of batches."""
        sets = self.mixture
        return {
            "clips": self.size,
            "seed": self.seed,
            "rows": self.batch_size if self.max_tokens is None else None,
            "tokens": self.max_tokens,
            "sets": [[name, size, sets.weights[name]] for name, size in sets.sizes.items()] if self.mixed else None,
            "sorting": self._sorting() if self.shuffle else None,
        }

    def _sorting(self) -> str:
        """A checksum of what the clips are sorted by."""
        digest = hashlib.sha256()
        for values in (self.tokens, self.modalities):
            digest.update(b"none" if values is None else values.tobytes())
        return digest.hexdigest()[:16]

    def _chance(self, number: int, clips: np.ndarray, batch: int) -> np.ndarray:
        """(N,) uint64 random bits, which depend on neither a clip's neighbours nor the ranks: a hash (splitmix64)."""
        if not self.shuffle:
            return np.zeros(len(clips), np.uint64)
        turn = batch if len(self.mixture.sizes) > 1 else 0
        start = (self.seed * 1_000_003 + number + 1) * 0x9E3779B97F4A7C15 + turn * 0xD1B54A32D192ED03
        x = clips.astype(np.uint64) + np.uint64(start % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    def _batches(self, number: int) -> Iterator[np.ndarray]:
        """The clips of all ranks in each batch of an epoch with shuffling."""
        chance = np.random.default_rng((self.seed, number))
        order = self.mixture.clips(self.seed, number)
        chance.shuffle(order)
        rest = order[:0]
        for start in range(0, len(order), WINDOW * self.rows):
            batches, rest = self._cut(np.concatenate([rest, order[start : start + WINDOW * self.rows]]))
            yield from (batches[i] for i in chance.permutation(len(batches)))
        if self.max_tokens is not None and len(rest) >= 2:
            room = self.max_tokens // int(self.tokens[rest].max())
            fewest = -(-len(rest) // room)
            yield from (batch for batch in _dealt(rest, max(fewest, self._repeats(rest))) if len(batch) >= 2)

    def _cut(self, clips: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Full batches of like clips, and the clips that are left."""
        repeats = self._repeats(clips)
        if self.max_tokens is None:
            # random ones are left, not the longest
            count = len(clips) // self.rows
            clips, rest = np.split(clips, [count * self.rows])
            groups = np.array_split(self._sorted(clips).reshape(count, self.rows), max(count // repeats, 1))
            return [batch for group in groups for batch in _dealt(group.ravel(), len(group))], rest
        clips = self._sorted(clips)
        tokens, batches, first = self.tokens[clips], [], 0
        while first < len(clips):
            most = self.max_tokens // int(tokens[first]) * repeats  # if all were as short as the first
            longest = np.maximum.accumulate(tokens[first : first + most + 1])
            full = np.flatnonzero(np.arange(len(longest)) >= self.max_tokens // longest * repeats)
            if not len(full):
                break
            batches += _dealt(clips[first : first + full[0]], repeats)
            first += full[0]
        return batches, clips[first:]

    def _sorted(self, clips: np.ndarray) -> np.ndarray:
        keys = [values[clips] for values in (self.tokens, self.modalities) if values is not None]
        if self._may_repeat:
            keys.insert(0, clips)  # among alike ones, the copies of a clip side by side
        return clips[np.lexsort(keys)] if keys else clips

    def _repeats(self, clips: np.ndarray) -> int:
        """How often the clip comes that comes most often."""
        return int(np.unique(clips, return_counts=True)[1].max()) if self._may_repeat and len(clips) else 1

    @property
    def _may_repeat(self) -> bool:
        return len(self.mixture.sizes) > 1


def _tokens(lengths: np.ndarray) -> np.ndarray:
    """(N,) seconds -> (N,) int32 positions, in the memory of one copy: there may be many millions of clips."""
    tokens = lengths * TOKENS_PER_SECOND
    np.ceil(tokens, out=tokens)
    return np.maximum(tokens, 1, out=tokens).astype(np.int32)


def _dealt(clips: np.ndarray, count: int) -> list[np.ndarray]:
    """Sorted clips -> batches, as cards are dealt, so that a clip that comes `count` times or less is in none twice.

    Its copies stand side by side, and in a contrastive loss one would be the other's wrong answer.
    """
    return [clips[i::count] for i in range(count)]
