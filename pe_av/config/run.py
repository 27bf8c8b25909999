"""The settings of a training run and of a conversion."""

from dataclasses import asdict, dataclass, field, replace

from pe_av.config.checks import as_yaml, nearest, one_of, require
from pe_av.config.data import DataConfig, SpanDemoConfig
from pe_av.config.model import CAPTIONS, HEADS, PAIRINGS, ModelConfig, PEAudioFrameConfig


@dataclass
class Pairing:
    """One contrastive objective: left embeddings against right ones, of which row i belongs to row i.

    An embedding made with a caption of a certain kind is called `<embedding>@<kind>`, as "text_audio@audio_visual".
    """

    name: str  # The name under which its loss is reported.
    left: str  # An embedding, one of HEADS.
    right: str  # The embedding that the left one is compared with.
    # The kind of caption that its text is taken from, one of CAPTIONS; null: clips have one caption of everything.
    caption: str | None = None
    weight: float = 1.0  # Its weight in the total loss. With 0 its loss is only reported.
    # The pairing, one of PAIRINGS, whose logit scale and bias it uses; null: the one with the same two embeddings.
    logits: str | None = None

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
                f"{where}: {self.left} and {self.right} are none of the pairings that have a scale and a bias: set "
                f"logits to the pairing whose scale and bias it should use, one of {', '.join(PAIRINGS)}",
            )
        one_of(f"{where}: logits", self.logits, PAIRINGS)

    @property
    def embeddings(self) -> tuple[str, str]:
        """(left, right); those that are made with text have the caption's kind appended, if there is one."""
        sides = (self.left, self.right)
        return tuple(f"{s}@{self.caption}" if self.caption and "text" in HEADS[s] else s for s in sides)


@dataclass
class LossConfig:
    """The sigmoid contrastive loss: what is paired with what (configs/loss), and with which weights."""

    __repr__ = as_yaml

    # Factors on the weights of pairings, by the pairing whose scale and bias they use. With 0 a loss is only reported.
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PAIRINGS, 1.0))
    pairings: list[Pairing] = field(default_factory=lambda: [Pairing(name, *PAIRINGS[name]) for name in PAIRINGS])
    # Before training, set the biases so that evaluation clips that do not belong together have a probability of
    # 1 / batch_size. For fine-tuning: the biases of a checkpoint suit the batch size that it was trained with.
    start_bias: bool = False

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            one_of("loss.weights", name, PAIRINGS)
            require(weight >= 0, f"loss.weights.{name}={weight} is negative")
        names = [pairing.name for pairing in self.pairings]
        require(bool(names), "loss.pairings is empty: name at least one pairing")
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, f"loss.pairings: {twice} is the name of two pairings: rename one")
        learned = any(pairing.weight for pairing in self.weighted())
        require(learned, "loss.weights: every pairing has weight 0, so there is nothing to learn")

    def weighted(self) -> list[Pairing]:
        """The pairings, each with its weight times the factor in `weights`."""
        return [replace(p, weight=p.weight * self.weights.get(p.logits, 1.0)) for p in self.pairings]


@dataclass
class OptimConfig:
    """AdamW and Muon, their learning rates, and which parts of the model they train (training/optim.py)."""

    __repr__ = as_yaml

    lr: float = 1e-3  # AdamW's highest learning rate, reached after the warm-up.
    # Train the matrices of all layers with Muon (training/muon.py) at this rate, such as 0.02; null: with AdamW.
    muon_lr: float | None = None
    weight_decay: float = 0.05  # Applied to matrices, but not to norms, biases, position embeddings and logit scales.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    warmup_steps: int = 100  # The learning rate rises linearly over this many steps.
    # After the warm-up the rate follows half a cosine down to final_lr_ratio · lr (cosine), or stays (constant).
    schedule: str = "cosine"
    final_lr_ratio: float = 0.0
    clip_norm: float = 1.0  # A gradient whose global norm is larger is scaled down to this norm.
    freeze: list[str] = field(default_factory=list)  # Parts that are not trained, such as [text, video.vision].
    lr_scale: dict[str, float] = field(default_factory=dict)  # Factors on the rates of parts, such as {text: 0.1}.
    layer_decay: float = 1.0  # In each tower, the rate of a layer is this factor times that of the layer above it.
    # Keep an exponential moving average of the weights with this decay, such as 0.999, and evaluate and export it.
    ema: float | None = None

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr} is not positive")
        require(self.muon_lr is None or self.muon_lr > 0, f"optim.muon_lr={self.muon_lr} is not positive")
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
    """Low-rank adapters, trained instead of the weights of the towers (training/lora.py)."""

    __repr__ = as_yaml

    rank: int = 0  # The rank of the adapters; 0: no adapters, all weights are trained.
    alpha: float = 16.0  # The output of an adapter is scaled by alpha / rank.

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank={self.rank} is negative")
        require(self.alpha > 0, f"lora.alpha={self.alpha} is not positive")


@dataclass
class ParallelConfig:
    """How processes share a model, and how a step saves memory and time. It never changes what is computed
    (training/parallel.py)."""

    __repr__ = as_yaml

    strategy: str = "ddp"  # With several ranks: ddp (every rank holds the whole model) or fsdp (every rank a shard).
    # With fsdp: the number of ranks that hold one copy of the model, such as the 8 GPUs of a node; null: all ranks.
    shard_size: int | None = None
    # With fsdp: send weights to other ranks in bfloat16. Needs precision=bf16, which uses them in bfloat16 anyway.
    shard_bf16: bool = False
    activation_checkpointing: bool = False  # Recompute blocks in the backward pass: less memory, a third more time.
    compile: bool = False  # Compile every block with torch.compile.
    timeout_minutes: float = 10.0  # When ranks have waited for one of them for this long, the run ends.

    def __post_init__(self) -> None:
        one_of("parallel.strategy", self.strategy, ("ddp", "fsdp"))
        require(self.timeout_minutes > 0, f"parallel.timeout_minutes={self.timeout_minutes} is not positive")
        require(
            self.shard_size is None or (self.shard_size >= 1 and self.strategy == "fsdp"),
            f"parallel.shard_size={self.shard_size} must be a positive number of ranks, with parallel.strategy=fsdp",
        )


@dataclass
class InitConfig:
    """Weights that single towers start from (conversion/warm_start.py); null: random weights."""

    __repr__ = as_yaml

    text: str | None = None  # ModernBERT: a folder in the format of transformers, with its tokenizer.json.
    vision: str | None = None  # PE-Core: a .safetensors file of timm, or a .pt file of the original.
    codec: str | None = None  # DAC: a folder in the format of transformers.


@dataclass
class RunConfig:
    """What every training run can set (training/trainer.py). A copy of the settings is written into its folder."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    # Start from this native checkpoint, whose own config then replaces `model`; null: start from random weights.
    checkpoint: str | None = None
    seed: int = 0  # Decides the random weights, the order of the data, and dropout.
    steps: int = 1000
    batch_size: int = 64  # Of all ranks together.
    eval_batch_size: int = 64  # Of one rank.
    log_every: int = 10  # Steps between two rows of the history.
    # Steps between two evaluations, each of which also exports the model. The last step always evaluates.
    eval_every: int = 250
    # Steps between two saved states. An interruption loses what was trained since the last. The last step always saves.
    save_every: int = 250
    save_minutes: float | None = None  # Also save when the last state is older than this.
    keep_checkpoints: int = 2  # The number of states that are kept, the newest ones.
    milestone_every: int | None = None  # Also keep the states of all steps that are a multiple of this.
    best: str | None = None  # Keep the model whose evaluation had the best value of this figure in best/; null: none.
    max_minutes: float | None = None  # Save and stop after this many minutes, before a scheduler ends the job.
    # Resume from this state, a folder state/step-…; auto: from the newest undamaged one in the run's folder, if any.
    resume: str | None = None
    device: str = "auto"  # A device of PyTorch, such as cuda or cpu; auto: cuda if there is a GPU.
    precision: str = "auto"  # fp32 | bf16 (autocast) | auto (bf16 on a GPU that computes in it, else fp32)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    # Rows that each rank embeds at a time; null: all of its rows. A small number saves memory, and the gradient stays
    # that of the whole batch.
    micro_batch_size: int | None = None
    accumulate: int = 1  # Batches per step. Their gradients are averaged, but each batch has only its own negatives.
    max_bad_fraction: float = 0.05  # Stop when a larger fraction of the items read so far is damaged.
    profile: bool = False  # Write a trace of steps 10 to 13, and of a GPU's memory in them, into profile/.
    wandb_project: str | None = None  # Also log to this project of Weights & Biases.

    def __post_init__(self) -> None:
        names = ("steps", "eval_batch_size", "eval_every", "save_every", "log_every", "accumulate", "keep_checkpoints")
        for name in names:
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} is not positive")
        for name in ("micro_batch_size", "milestone_every", "save_minutes", "max_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} is not positive")
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))


@dataclass
class TrainConfig(RunConfig):
    """`python train.py`: the contrastive training of PEAudioVideo."""

    __repr__ = as_yaml

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    init: InitConfig = field(default_factory=InitConfig)  # Not together with `checkpoint`, which fills every tower.
    lora: LoraConfig = field(default_factory=LoraConfig)
    # Manifest of other clips that are evaluated too, from before the first step on, to see what fine-tuning forgets.
    watch: str | None = None
    best: str | None = "R@1"  # R@1 (mean of all directions) | "R@1/<direction>", as "R@1/text->audio" | held_out_loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 2, f"batch_size={self.batch_size}: a contrastive loss needs at least 2")
        require(
            self.checkpoint is None or not any(asdict(self.init).values()),
            "checkpoint and init are both set: a checkpoint fills every tower; leave one out",
        )


@dataclass
class SpanTrainConfig(RunConfig):
    """`python -m pe_av.training.frame`: PEAudioFrame, on recordings with captions and the spans that these describe."""

    __repr__ = as_yaml

    model: PEAudioFrameConfig = field(default_factory=PEAudioFrameConfig)
    # Manifest: JSONL of {"path", "caption", "spans": [[start_s, end_s], …]}. null: train and evaluate on the demo.
    train: str | None = None
    eval: str | None = None  # A manifest like `train`, of other recordings.
    demo: SpanDemoConfig = field(default_factory=SpanDemoConfig)
    max_seconds: float = 30.0  # Longer recordings are cut to their beginning.
    num_workers: int = 2  # Processes that decode while the model trains; 0: decode in the training process.
    # Seconds that a worker may take for one recording. After that it is replaced, and the recording counts as damaged.
    time_limit: float = 60.0
    steps: int = 400
    batch_size: int = 32
    eval_every: int = 100
    save_every: int = 100
    best: str | None = "AP"  # AP | F1 | "best F1" | IoU | "event F1" | "best event F1" | "PSDS 0.7" | held_out_loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.train is None) == (self.eval is None), "train and eval: give both manifests, or none")
        require(self.batch_size >= 1, f"batch_size={self.batch_size} is not positive")


@dataclass
class ConvertConfig:
    """`python convert.py`: a checkpoint of any known format, converted to ours or to that of transformers."""

    source: str = "???"  # A folder, or a name on the Hugging Face hub, optionally followed by "@revision".
    target: str = "???"  # The folder to write; it must not exist yet.
    to: str = "native"  # native | hf (transformers)

    def __post_init__(self) -> None:
        one_of("to", self.to, ("native", "hf"))
