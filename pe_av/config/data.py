"""The settings of the data: which clips there are, and how they are read."""

from dataclasses import dataclass, field

from pe_av.config.checks import as_yaml, one_of, require

READERS = ("pyav", "decord", "torchcodec")


@dataclass
class DemoConfig:
    """The demo world: small scenes that are rendered to MP4 files on first use (data/demo.py)."""

    root: str = "data/demo"  # The folder that the files are written to.
    seed: int = 0  # Another seed renders other scenes.
    train_clips: int = 2944  # Each of the 1,472 combinations of attributes that are not held out, in two renderings.
    eval_clips: int = 256
    # Evaluate on other clips, held out of the training ones in the same manner: to choose settings by, so that the
    # evaluation clips have no part in the choice.
    validation: bool = False


@dataclass
class StampsConfig:
    """The stamps of Tux Paint: captioned pictures with sounds, made into clips on first use (data/stamps.py)."""

    source: str = "/usr/share/tuxpaint/stamps"  # The folder where the Debian package puts the stamps.
    root: str = "data/stamps"  # The folder that the clips are written to.
    languages: list[str] = field(default_factory=lambda: ["en", "fr", "es"])  # Spoken descriptions in these are used.


@dataclass
class MixConfig:
    """One of several data sets that are mixed for training."""

    train: str  # Path of the manifest.
    split: str | None = None  # Use only the rows of this split; null: all rows.
    weight: float = 1.0  # The set's share of an epoch is its weight divided by the sum of all weights.

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data.mix: {self.train}: weight={self.weight} is not positive")


@dataclass
class DataConfig:
    """The clips to train and evaluate on, and how they are read. data/manifest.py says what a manifest is."""

    __repr__ = as_yaml

    train: str | None = None  # Manifest to train on: a .jsonl, .csv or .parquet file.
    eval: str | None = None  # Manifest to evaluate on.
    train_split: str | None = None  # Train only on the rows of this split; null: on all.
    eval_split: str | None = None  # Evaluate only on the rows of this split; null: on all.
    corpus: str | None = None  # The public corpus that `eval` is, whose published figures stand in reports.

    # Instead of `train`: several sets, each with a name of your choice, drawn in proportion to their weights.
    mix: dict[str, MixConfig] = field(default_factory=dict)
    # Instead of `train`: tar shards that are read as a stream, such as s3://bucket/{000..127}.tar (loading/stream.py).
    shards: str | None = None
    shuffle_window: int = 1000  # The number of samples of a stream that are shuffled at a time.

    # Instead of manifests: render the demo world, or make clips of the stamps, and use those.
    demo: DemoConfig | None = None
    stamps: StampsConfig | None = None

    max_seconds: float = 30.0  # Clips that are longer than this many seconds are cut to their beginning.
    # Train on another random section of such a clip in every epoch, if the manifest says how long the clip is.
    random_crop: bool = False
    # What decodes the frames of ordinary files: pyav | decord | torchcodec, two optional packages (media/readers.py).
    reader: str = "pyav"
    in_memory: bool = False  # Decode every file once, before training, and keep the result; for small sets.
    num_workers: int = 2  # Processes that decode while the model trains; 0: decode in the training process.
    # Seconds that a worker may take for one clip. After that it is replaced, and the clip counts as damaged.
    time_limit: float = 60.0
    # Instead of `batch_size`: fill each batch, of all ranks together, up to this many audio positions (25 per second).
    batch_tokens: int | None = None
    cache: str | None = None  # Read features from this folder, which python -m pe_av.data.cache has written.

    def __post_init__(self) -> None:
        require(self.max_seconds > 0, f"data.max_seconds={self.max_seconds} is not positive")
        one_of("data.reader", self.reader, READERS)
        require(self.num_workers >= 0, f"data.num_workers={self.num_workers} is negative")
        require(self.time_limit > 0, f"data.time_limit={self.time_limit} is not positive")
        require(
            self.batch_tokens is None or self.batch_tokens >= 2, f"data.batch_tokens={self.batch_tokens} is below 2"
        )
        require(
            not self.random_crop or (self.cache is None and not self.in_memory),
            "data.random_crop=true decodes another section every time: unset data.cache and data.in_memory",
        )
        sources = {"train": self.train, "mix": self.mix or None, "shards": self.shards}
        given = [f"data.{name}" for name, source in sources.items() if source is not None]
        require(len(given) <= 1, f"{' and '.join(given)} are both set: set only one; data.mix can name several sets")
        require(
            self.shards is None or (self.cache is None and not self.in_memory and self.batch_tokens is None),
            "data.shards is read as a stream, without data.cache, data.in_memory and data.batch_tokens: unset these",
        )
        require(self.shuffle_window >= 1, f"data.shuffle_window={self.shuffle_window} is not positive")


@dataclass
class WindowsConfig:
    """Evaluation of clips that last longer than a window: several windows of each are embedded."""

    seconds: float | None = None  # The length of a window; null: clips are embedded whole, up to data.max_seconds.
    hop: float | None = None  # From the beginning of a window to that of the next; null: `seconds`, without overlap.
    # mean | best: a clip's embedding is the mean of those of its windows; or the score of two clips, or of a clip and a
    # caption, is the highest of their windows.
    combine: str = "mean"

    def __post_init__(self) -> None:
        one_of("windows.combine", self.combine, ("mean", "best"))
        require(self.seconds is None or self.seconds > 0, f"windows.seconds={self.seconds} is not positive")
        require(self.hop is None or self.seconds is not None, "windows.hop is set without windows.seconds: set both")
        require(
            self.hop is None or 0 < self.hop <= (self.seconds or 0),
            f"windows.hop={self.hop} is not between 0 and windows.seconds={self.seconds}: what lies between windows "
            "would not be seen",
        )

    def check(self, data: DataConfig) -> None:
        """Raise ConfigError if the clips of `data` cannot be embedded in windows."""
        if self.seconds is None:
            return
        require(
            self.seconds <= data.max_seconds,
            f"windows.seconds={self.seconds} is longer than data.max_seconds={data.max_seconds}, to which windows "
            "would be cut: raise the latter",
        )
        require(
            data.cache is None,
            "windows.seconds and data.cache are both set, but the cache holds features of whole clips: unset one",
        )


@dataclass
class SpanDemoConfig:
    """The demo for frame-level training: recordings of two sounds, with the caption of one (data/span_demo.py)."""

    root: str = "data/frame_demo"  # The folder that the files are written to.
    seed: int = 0  # Another seed renders other recordings.
    train_clips: int = 480
    eval_clips: int = 96

    def __post_init__(self) -> None:
        require(min(self.train_clips, self.eval_clips) >= 1, "demo: train_clips and eval_clips must be positive")
        require(self.seed >= 0, f"demo.seed={self.seed} is negative")
