"""The settings of a training run, of an evaluation and of a conversion."""

from dataclasses import asdict, dataclass, field, replace

from pe_av.config.checks import nearest, one_of, require
from pe_av.config.data import DataConfig, SpanDemoConfig
from pe_av.config.model import CAPTIONS, HEADS, PAIRINGS, ModelConfig, PEAudioFrameConfig


@dataclass
class Pairing:
    """One contrastive objective: left embeddings against right ones, row i of both belonging together.

    An embedding of a caption of a certain kind is called `<embedding>@<kind>`, e.g. "text_audio@audio_visual".
    """

    name: str  # under which its loss is reported
    left: str  # embedding, of HEADS
    right: str
    caption: str | None = None  # the kind, of CAPTIONS, that its text is of; None: a clip has one caption for all
    weight: float = 1.0  # in the sum; 0 only reports it
    logits: str | None = None  # the pairing, of PAIRINGS, whose scale and bias it uses; None: the one with its sides

    def __post_init__(self) -> None:
        where = f"loss.pairings: {self.name}"
        for side in (self.left, self.right):
            require(side in HEADS, f"{where}: there is no embedding {side}{nearest(side, HEADS)}")
        if self.caption is not None:
            one_of(f"{where}: caption", self.caption, CAPTIONS)
            require(
                any("text" in HEADS[side] for side in (self.left, self.right)),
                f"{where}: caption={self.caption}, but neither {self.left} nor {self.right} is made with text",
            )
        require(self.weight >= 0, f"{where}: weight={self.weight} is negative")
        if self.logits is None:
            self.logits = next((name for name, sides in PAIRINGS.items() if sides == (self.left, self.right)), None)
            require(
                self.logits is not None,
                f"{where}: {self.left} and {self.right} are none of the pairings that have a scale and a bias: "
                f"set logits to the one whose it shall use, of {', '.join(PAIRINGS)}",
            )
        one_of(f"{where}: logits", self.logits, PAIRINGS)

    @property
    def embeddings(self) -> tuple[str, str]:
        """(left, right), with the caption's kind where there is one and text is part of the embedding."""
        sides = (self.left, self.right)
        return tuple(f"{s}@{self.caption}" if self.caption and "text" in HEADS[s] else s for s in sides)


@dataclass
class LossConfig:
    """Sigmoid contrastive loss: what is paired with what (configs/loss), and with which weight in the sum."""

    # factor on the weight of all pairings that use this one's scale and bias; 0 learns nothing from them
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PAIRINGS, 1.0))
    pairings: list[Pairing] = field(default_factory=lambda: [Pairing(name, *PAIRINGS[name]) for name in PAIRINGS])
    # start biases where a pair that does not belong together has a probability of 1 / batch_size, on the evaluation
    # set: a checkpoint's biases are those of the batches that it was trained with
    start_bias: bool = False

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            one_of("loss.weights", name, PAIRINGS)
            require(weight >= 0, f"loss.weights.{name}={weight} is negative")
        names = [pairing.name for pairing in self.pairings]
        require(bool(names), "loss.pairings is empty: there is nothing to learn from")
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, f"loss.pairings: {twice} is the name of two pairings: rename one")
        learned = any(pairing.weight for pairing in self.weighted())
        require(learned, "loss.weights: every pairing has weight 0, so nothing would be learned")

    def weighted(self) -> list[Pairing]:
        """The pairings, each with its weight times the factor in `weights`."""
        return [replace(p, weight=p.weight * self.weights.get(p.logits, 1.0)) for p in self.pairings]


@dataclass
class OptimConfig:
    """AdamW with linear warm-up, then cosine decay to `final_lr_ratio` or a constant rate."""

    lr: float = 1e-3
    weight_decay: float = 0.05  # on matrices only: not on norms, biases, scales, embeddings of position
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    schedule: str = "cosine"  # cosine | constant
    warmup_steps: int = 100
    final_lr_ratio: float = 0.0
    clip_norm: float = 1.0  # largest global gradient norm
    freeze: list[str] = field(default_factory=list)  # parts that stay as they are, e.g. [text, video.vision]
    lr_scale: dict[str, float] = field(default_factory=dict)  # part -> factor on its learning rate, e.g. {text: 0.1}
    layer_decay: float = 1.0  # factor on the rate from each layer of a tower to the one below it
    ema: float | None = None  # decay of an average of the weights, which is then evaluated and exported

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr} is not positive")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} is negative")
        require(self.clip_norm > 0, f"optim.clip_norm={self.clip_norm} is not positive")
        one_of("optim.schedule", self.schedule, ("cosine", "constant"))
        require(0 < self.layer_decay <= 1, f"optim.layer_decay={self.layer_decay} is not in (0, 1]")
        require(self.ema is None or 0 < self.ema < 1, f"optim.ema={self.ema} is not between 0 and 1")
        require(all(f >= 0 for f in self.lr_scale.values()), f"optim.lr_scale={self.lr_scale}: a factor is negative")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), f"optim.betas={self.betas} is not [b1, b2]"
        )


@dataclass
class LoraConfig:
    """Low-rank adapters in place of training all weights (training/lora.py)."""

    rank: int = 0  # 0: none, all weights train
    alpha: float = 16.0  # the change is scaled by alpha / rank

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank={self.rank} is negative")
        require(self.alpha > 0, f"lora.alpha={self.alpha} is not positive")


@dataclass
class ParallelConfig:
    """How many processes and how much memory a step takes (training/parallel.py); never what it computes."""

    strategy: str = "ddp"  # with several ranks: ddp (every rank holds the model) | fsdp (shards of it)
    # fsdp: ranks that hold one copy of the model among them, e.g. the 8 GPUs of a node; null: all ranks
    shard_size: int | None = None
    shard_bf16: bool = False  # fsdp: gather weights in bfloat16; needs precision=bf16, in which they are used anyway
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    compile: bool = False  # torch.compile of every block
    timeout_minutes: float = 10.0  # a rank that others wait for longer than this is lost

    def __post_init__(self) -> None:
        one_of("parallel.strategy", self.strategy, ("ddp", "fsdp"))
        require(self.timeout_minutes > 0, f"parallel.timeout_minutes={self.timeout_minutes} is not positive")
        require(
            self.shard_size is None or (self.shard_size >= 1 and self.strategy == "fsdp"),
            f"parallel.shard_size={self.shard_size}: it is a number of ranks, and needs parallel.strategy=fsdp",
        )


@dataclass
class InitConfig:
    """Weights to start single towers from, trained elsewhere (conversion/warm_start.py); None: random."""

    text: str | None = None  # ModernBERT: transformers folder with its tokenizer.json
    vision: str | None = None  # PE-Core: timm's safetensors or the original's .pt
    codec: str | None = None  # DAC: transformers folder


@dataclass
class RunConfig:
    """What every training run has, whatever it trains (training/run.py); a copy is written into its folder."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: str | None = None  # native checkpoint to start from, which then decides `model`; None: random weights
    seed: int = 0
    steps: int = 1000
    batch_size: int = 64  # of all ranks together
    eval_batch_size: int = 64  # of one rank
    log_every: int = 10
    eval_every: int = 250  # steps between evaluations, each of which also exports the model; the last step always does
    save_every: int = 250  # steps between states to go on from, all that an interruption costs; the last step saves too
    save_minutes: float | None = None  # also save when the last state is older than this
    keep_checkpoints: int = 2  # the newest states that stay
    milestone_every: int | None = None  # states of steps that are a multiple of this stay too
    best: str | None = None  # figure of the evaluations whose best model stays in best/; null: of none
    max_minutes: float | None = None  # save and leave after so long, as a scheduler will demand it
    resume: str | None = None  # state to go on from; auto: the newest whole one in the run's folder
    device: str = "auto"  # auto: CUDA where there is one
    precision: str = "auto"  # auto: bf16 on a GPU that has it, else fp32
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int | None = None  # rows embedded at a time, on each rank, with the whole batch's gradient
    accumulate: int = 1  # batches, each with its own negatives, whose gradients are averaged in one step
    max_bad_fraction: float = 0.05  # stop when more of the items that were read than this are damaged
    profile: bool = False  # write a trace of steps 10 to 13, and of a GPU's memory, into profile/
    wandb_project: str | None = None  # also log to Weights & Biases

    def __post_init__(self) -> None:
        names = ("steps", "eval_batch_size", "eval_every", "save_every", "log_every", "accumulate", "keep_checkpoints")
        for name in names:
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} is not positive")
        for name in ("micro_batch_size", "milestone_every", "save_minutes", "max_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} is not positive")
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))


# Settings that a state fixes: with another value, what goes on would not be the same run. All others may be changed on
# resume, and hold from there on. Where the data lie may change; how many clips there are is in the loader's own state.
FIXED_ON_RESUME = (
    "model", "seed", "batch_size", "accumulate", "lora", "optim.freeze", "loss.pairings", "data.max_seconds",
    "data.batch_tokens", "data.random_crop", "data.shuffle_window", "max_seconds",
)  # fmt: skip


@dataclass
class TrainConfig(RunConfig):
    """`python train.py`: the contrastive training of PEAudioVideo."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    init: InitConfig = field(default_factory=InitConfig)  # instead of `checkpoint`: single towers from elsewhere
    lora: LoraConfig = field(default_factory=LoraConfig)
    watch: str | None = None  # manifest of other clips, evaluated too: what is forgotten on the way
    best: str | None = "R@1"  # R@1 (mean of all directions) | R@1/<direction>, e.g. "R@1/text->audio" | held_out_loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 2, f"batch_size={self.batch_size}: a contrastive loss needs at least 2")
        require(
            self.checkpoint is None or not any(asdict(self.init).values()),
            "checkpoint and init are both set: a checkpoint fills every tower; leave one out",
        )


@dataclass
class SpanTrainConfig(RunConfig):
    """`python -m pe_av.training.frame`: PEAudioFrame from recordings with captions and the times they are about."""

    model: PEAudioFrameConfig = field(default_factory=PEAudioFrameConfig)
    train: str | None = None  # JSONL of {"path", "caption", "spans": [[start_s, end_s], …]}; None: the demo
    eval: str | None = None
    demo: SpanDemoConfig = field(default_factory=SpanDemoConfig)
    max_seconds: float = 30.0  # longer recordings are cut to their first part
    num_workers: int = 2  # processes that decode while the model trains; 0: decode in the training process
    time_limit: float = 60.0  # seconds in which a worker must have read a recording
    steps: int = 400
    batch_size: int = 32
    eval_every: int = 100
    save_every: int = 100
    best: str | None = "AP"  # AP | F1 | "best F1" | IoU | held_out_loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.train is None) == (self.eval is None), "train and eval: give both manifests, or none")
        require(self.batch_size >= 1, f"batch_size={self.batch_size} is not positive")


@dataclass
class EvalConfig:
    """`python eval.py`: zero-shot retrieval with a native checkpoint."""

    checkpoint: str = "???"  # folder
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 64
    device: str = "auto"  # auto: CUDA where there is one
    precision: str = "fp32"
    max_bad_fraction: float = 0.05  # stop when more of the items that were read than this are damaged
    timeout_minutes: float = 10.0  # a rank that others wait for longer than this is lost

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size={self.batch_size} is not positive")
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))


@dataclass
class ConvertConfig:
    """`python convert.py`: a checkpoint of another format, to ours or to transformers'."""

    source: str = "???"  # folder, or name on the Hugging Face hub, optionally with "@revision"
    target: str = "???"  # folder that does not exist yet
    to: str = "native"  # native | hf

    def __post_init__(self) -> None:
        one_of("to", self.to, ("native", "hf"))


# ---------------------------------------------------------------------------------------------------------------------
# checks
