"""The settings of the data: which clips, and how they are read."""

from dataclasses import dataclass, field

from pe_av.config.checks import require


@dataclass
class DemoConfig:
    """The demo world: small scenes, rendered once to MP4 files (data/demo.py)."""

    root: str = "data/demo"  # where the files go
    seed: int = 0
    train_clips: int = 1472
    eval_clips: int = 256


@dataclass
class StampsConfig:
    """The stamps of Tux Paint: captioned pictures with sounds, made into clips once (data/stamps.py)."""

    source: str = "/usr/share/tuxpaint/stamps"  # where the Debian package puts them
    root: str = "data/stamps"  # where the clips go
    languages: list[str] = field(default_factory=lambda: ["en", "fr", "es"])  # of the spoken descriptions


@dataclass
class MixConfig:
    """One of several data sets to train on."""

    train: str  # manifest
    split: str | None = None  # only the rows of this split; None: all
    weight: float = 1.0  # how much of an epoch is of it, in proportion to the weights of the others

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data.mix: {self.train}: weight={self.weight} is not positive")


@dataclass
class DataConfig:
    """Clips with captions. What a manifest is: data/manifest.py."""

    train: str | None = None  # manifest to train on: .jsonl, .csv or .parquet
    eval: str | None = None  # manifest to evaluate on
    train_split: str | None = None  # only the rows of this split; None: all
    eval_split: str | None = None
    mix: dict[str, MixConfig] = field(default_factory=dict)  # instead of train: name -> set, drawn by weights
    # instead of train: tar shards that are read one after the other, as s3://bucket/{000..127}.tar (loading/stream.py)
    shards: str | None = None
    shuffle_window: int = 1000  # samples of a stream of shards among which the order is random
    demo: DemoConfig | None = None  # render the demo world and use its two manifests
    stamps: StampsConfig | None = None  # or the stamps
    max_seconds: float = 30.0  # longer files are cut to their first part
    random_crop: bool = False  # train on another part of a longer clip in every epoch, where its length is known
    in_memory: bool = False  # decode every file once and keep it: for small sets
    num_workers: int = 2  # processes that decode while the model trains; 0: decode in the training process
    time_limit: float = 60.0  # seconds in which a worker must have read a clip; else it is replaced and the clip bad
    # instead of batch_size: positions of sound, 25 per second, that a batch of all ranks together may hold
    batch_tokens: int | None = None
    cache: str | None = None  # folder of features that python -m pe_av.data.cache has computed

    def __post_init__(self) -> None:
        require(self.max_seconds > 0, f"data.max_seconds={self.max_seconds} is not positive")
        require(self.num_workers >= 0, f"data.num_workers={self.num_workers} is negative")
        require(self.time_limit > 0, f"data.time_limit={self.time_limit} is not positive")
        require(
            self.batch_tokens is None or self.batch_tokens >= 2, f"data.batch_tokens={self.batch_tokens} is below 2"
        )
        require(
            not self.random_crop or (self.cache is None and not self.in_memory),
            "data.random_crop=true needs the files themselves: unset data.cache and data.in_memory",
        )
        sources = {"train": self.train, "mix": self.mix or None, "shards": self.shards}
        given = [f"data.{name}" for name, source in sources.items() if source is not None]
        require(len(given) <= 1, f"{' and '.join(given)} are both set: train on one of them; a mix may have many sets")
        require(
            self.shards is None or (self.cache is None and not self.in_memory and self.batch_tokens is None),
            "data.shards is read as a stream: it goes with none of data.cache, data.in_memory and data.batch_tokens",
        )
        require(self.shuffle_window >= 1, f"data.shuffle_window={self.shuffle_window} is not positive")


@dataclass
class SpanDemoConfig:
    """Sounds at different times, and the caption of one of them (data/span_demo.py)."""

    root: str = "data/frame_demo"
    seed: int = 0
    train_clips: int = 480
    eval_clips: int = 96

    def __post_init__(self) -> None:
        require(min(self.train_clips, self.eval_clips) >= 1, "demo: train_clips and eval_clips must be positive")
        require(self.seed >= 0, f"demo.seed={self.seed} is negative")
