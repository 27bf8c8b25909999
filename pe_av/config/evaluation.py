"""The settings of what uses a model: retrieval, embedding a corpus, classification, probes, and localization."""

from dataclasses import dataclass, field, fields
from typing import Any

from pe_av.config.checks import as_yaml, one_of, require
from pe_av.config.data import DataConfig, SpanDemoConfig, WindowsConfig
from pe_av.config.model import HEADS

MODALITIES = ("audio", "video", "audio_video")


@dataclass
class EmbeddingConfig:
    """What everything shares that embeds clips with a checkpoint."""

    checkpoint: str = "???"  # The folder of a native checkpoint.
    data: DataConfig = field(default_factory=DataConfig)
    windows: WindowsConfig = field(default_factory=WindowsConfig)
    batch_size: int = 64  # Of one rank.
    device: str = "auto"  # A device of PyTorch, such as cuda or cpu; auto: cuda if there is a GPU.
    precision: str = "fp32"  # fp32 | bf16 (autocast) | auto (bf16 on a GPU that computes in it, else fp32)
    max_bad_fraction: float = 0.05  # Stop when a larger fraction of the items read so far is damaged.
    timeout_minutes: float = 10.0  # When ranks have waited for one of them for this long, they end.

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size={self.batch_size} is not positive")
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        self.windows.check(self.data)


@dataclass
class EvalConfig(EmbeddingConfig):
    """`python eval.py`: zero-shot retrieval with a native checkpoint."""

    __repr__ = as_yaml

    checkpoint: Any = "???"  # The folder of a native checkpoint; or a list of such, which are compared with the first.
    protocol: str = "dot"  # What items are ranked by: dot (the dot product) | cosine.
    # Also the original repository's protocol, by which published figures were made: cosines × 10, times their softmax
    # over the queries (evaluation/ranking.py). It takes several times as long as the dot products.
    reweighted: bool = True
    report: bool = True  # Also write report.html and report.md (evaluation/html_report.py).

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("protocol", self.protocol, ("dot", "cosine"))
        paths = self.checkpoint if isinstance(self.checkpoint, list) else [self.checkpoint]
        require(
            len(paths) > 0 and all(isinstance(path, str | int) for path in paths),
            f"checkpoint={self.checkpoint} is neither a folder nor a list of folders",
        )
        paths = [str(path) for path in paths]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        require(twice is None, f"checkpoint: {twice} is in the list twice")
        self.checkpoint = paths if isinstance(self.checkpoint, list) else paths[0]


@dataclass
class EmbedConfig(EmbeddingConfig):
    """`python -m pe_av.embed`: the embeddings of a corpus, in a folder that `python -m pe_av.search` searches."""

    __repr__ = as_yaml

    target: str = "???"  # The folder that the embeddings are written to. If it was begun before, it is completed.
    # What to embed: a manifest, a folder, or a pattern such as 'clips/**/*.mp4'; of media files or of tar shards.
    # null: data.eval, or the evaluation clips of data=demo.
    source: str | None = None
    embeddings: list[str] | None = None  # Which embeddings are kept, such as [audio, video]; null: all that there are.
    part_rows: int = 4096  # Rows of a part, the file that is written at once: what an interruption loses at most.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.part_rows >= 1 and self.part_rows % self.batch_size == 0,
            f"part_rows={self.part_rows} is not a multiple of batch_size={self.batch_size}, so a batch would lie in "
            "two parts",
        )
        require(self.windows.combine == "mean", "windows.combine: every window is embedded for itself; leave it out")
        require(self.embeddings != [], "embeddings=[] leaves nothing to keep: name some, or null for all")
        for name in self.embeddings or ():
            one_of("embeddings", name, list(HEADS))


@dataclass
class RayEmbedConfig(EmbedConfig):
    """`python -m pe_av.embed_ray`: the same on a cluster."""

    actors: int = 1  # Processes that compute parts at the same time, each with a model.
    gpus_per_actor: float = 0.0  # GPUs of each; a fraction lets several share one.
    cpus_per_actor: float = 1.0  # Processor cores that are kept for each.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.actors >= 1, f"actors={self.actors} is not positive")
        require(self.gpus_per_actor >= 0, f"gpus_per_actor={self.gpus_per_actor} is negative")
        require(self.cpus_per_actor > 0, f"cpus_per_actor={self.cpus_per_actor} is not positive")


@dataclass
class AppConfig:
    """`python -m pe_av.app`: a page to try a model on."""

    index: str = "???"  # The folder that python -m pe_av.embed has written.
    checkpoint: str | None = None  # Where the model is now that made the index; null: where it was then.
    frame: str | None = None  # The checkpoint of a PEAudioFrame, which shows when something is heard; null: without.
    device: str = "auto"  # A device of PyTorch, such as cuda or cpu; auto: cuda if there is a GPU.
    host: str = "127.0.0.1"  # Who can open the page: 127.0.0.1, only this machine; 0.0.0.0, the network.
    port: int = 7860


@dataclass
class LabelledConfig(EmbeddingConfig):
    """What classification and probes share."""

    # What clips are classified by, such as [audio, audio_video]; null: all that model and clips have.
    modalities: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.modalities or ():
            one_of("modalities", name, MODALITIES)
        require(self.modalities != [], "modalities=[] leaves nothing to classify by: name some, or null for all")


@dataclass
class PromptsConfig:
    """The sentences that stand for a class, by what they are compared with; `{}` is the place of its label."""

    audio: list[str] = field(default_factory=lambda: ["{}"])
    video: list[str] = field(default_factory=lambda: ["{}"])
    audio_video: list[str] = field(default_factory=lambda: ["{}"])

    def __post_init__(self) -> None:
        for modality in (one.name for one in fields(self)):
            templates = getattr(self, modality)
            require(bool(templates), f"prompts.{modality} is empty: give at least one template, such as '{{}}'")
            for template in templates:
                places = template.count("{}")
                require(
                    places == 1 and "{" not in template.replace("{}", "") and "}" not in template.replace("{}", ""),
                    f"prompts.{modality}: {template!r} must have exactly one place for the label, written {{}}, and no "
                    f"other braces; it has {places} places",
                )


@dataclass
class ClassifyConfig(LabelledConfig):
    """`python -m pe_av.evaluation.classification`: zero-shot classification."""

    prompts: PromptsConfig = field(default_factory=PromptsConfig)  # configs/prompts; by default those of `data`.
    # A text file with the label of one class a line. null: classes.txt beside the manifest, which the recipes write;
    # where there is none, the labels of the clips.
    classes: str | None = None


@dataclass
class ProbeConfig(LabelledConfig):
    """`python -m pe_av.evaluation.probe`: a linear probe and nearest neighbours on frozen embeddings."""

    # Strengths of the inverse regularization of the linear probe, and numbers of neighbours. Those that are best on the
    # validation part of the training clips are used.
    inverse_regularization: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.1, 1.0, 10.0, 100.0])
    neighbours: list[int] = field(default_factory=lambda: [1, 5, 10, 20])
    validation: float = 0.2  # The fraction of each class's training clips that is held out to choose by.
    max_iterations: int = 1000  # Of the solver of the linear probe.
    seed: int = 0  # Decides which clips are held out.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.windows.combine == "mean", "windows.combine=best scores pairs; a probe needs windows.combine=mean")
        for name in ("inverse_regularization", "neighbours"):
            values = getattr(self, name)
            require(bool(values) and min(values) > 0, f"{name}={values} must be positive numbers, at least one")
        require(0 < self.validation < 1, f"validation={self.validation} is not between 0 and 1")
        require(self.max_iterations >= 1, f"max_iterations={self.max_iterations} is not positive")
        require(self.seed >= 0, f"seed={self.seed} is negative")


@dataclass
class LocalizeConfig:
    """`python -m pe_av.evaluation.localization`: when is it heard? With a PEAudioFrame."""

    checkpoint: str = "???"  # The folder of a native checkpoint.
    # Manifest: JSONL of {"path", "caption", "spans": [[start_s, end_s], …]}. null: the demo's held-out recordings.
    eval: str | None = None
    demo: SpanDemoConfig = field(default_factory=SpanDemoConfig)
    threshold: float = 0.5  # Positions with a higher probability are marked.
    drawn: int = 4  # The number of recordings in spans.png, the first ones.
    max_seconds: float = 30.0  # Longer recordings are cut to their beginning.
    num_workers: int = 2  # Processes that decode while the model computes; 0: decode in the same process.
    time_limit: float = 60.0  # Seconds that a worker may take for one recording.
    batch_size: int = 64  # Of one rank.
    device: str = "auto"  # A device of PyTorch, such as cuda or cpu; auto: cuda if there is a GPU.
    precision: str = "fp32"  # fp32 | bf16 (autocast) | auto (bf16 on a GPU that computes in it, else fp32)
    max_bad_fraction: float = 0.05  # Stop when a larger fraction of the recordings read so far is damaged.
    timeout_minutes: float = 10.0  # When ranks have waited for one of them for this long, the evaluation ends.

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size={self.batch_size} is not positive")
        require(0 <= self.threshold <= 1, f"threshold={self.threshold} is not a probability")
        require(self.drawn >= 0, f"drawn={self.drawn} is negative")
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))
