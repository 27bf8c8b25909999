"""Every setting there is, one dataclass per module: type, unit, default, and why. YAML under `configs/` is merged into
these, so a misspelt key or a wrong type fails before anything is built.

The defaults of the model's parts are those of the published `large` model. Nothing here imports torch.
"""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

# (left, right) embeddings of each pairing: `logits_<pairing>` has the left ones in its rows (design, section 3)
PAIRINGS: dict[str, tuple[str, str]] = {
    "audio_text": ("audio", "text_audio"),
    "video_text": ("video", "text_video"),
    "audio_video": ("audio", "video"),
    "audio_video_text": ("audio_video", "text_audio_video"),
    "audio_plus_text_video": ("audio_plus_text", "video"),
    "video_plus_text_audio": ("video_plus_text", "audio"),
}

# the parts that each embedding is made with
HEADS: dict[str, tuple[str, ...]] = {
    "audio": ("audio",),
    "video": ("video",),
    "audio_video": ("audio", "video", "fusion"),
    "text_audio": ("text",),
    "text_video": ("text",),
    "text_audio_video": ("text",),
    "audio_plus_text": ("audio", "text"),
    "video_plus_text": ("video", "text"),
}
TOWERS = ("text", "audio", "video", "fusion")
CAPTIONS = ("audio", "visual", "audio_visual")  # what a caption can tell of a clip, where it has one of each

ATTENTIONS = ("eager", "sdpa", "flex")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")  # the names that published configs use


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# the model


@dataclass
class RopeConfig:
    """Rotary position embedding of a temporal transformer."""

    rope_type: str = (
        "default"  # default | linear (positions divided by `factor`) | dynamic (base grows past the maximum)
    )
    rope_theta: float = 20_000.0
    factor: float = 1.0  # used by linear and dynamic


@dataclass
class TransformerConfig:
    """The encoder over time that audio, video and fusion share (paper, section 3)."""

    hidden_size: int = 1792
    intermediate_size: int = 4800  # width of the gated MLP
    num_hidden_layers: int = 28
    num_attention_heads: int = 14
    num_key_value_heads: int | None = None  # None: as many as attention heads; fewer: grouped-query attention
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 10_000  # positions, the class token included; 400 s at 25 per second
    initializer_range: float = 0.02  # standard deviation of the normal that weights start from
    rms_norm_eps: float = 1e-5
    rope_parameters: RopeConfig = field(default_factory=RopeConfig)
    attention_bias: bool = False
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.num_attention_heads % self.key_value_heads == 0,
            f"num_attention_heads={self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}: choose a divisor",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} is odd: rotary embedding turns pairs")
        require(0 <= self.attention_dropout < 1, f"attention_dropout={self.attention_dropout} is not in [0, 1)")
        one_of("hidden_act", self.hidden_act, ACTIVATIONS)
        one_of("rope_type", self.rope_parameters.rope_type, ("default", "linear", "dynamic"))
        require(self.rope_parameters.factor >= 1, f"rope factor={self.rope_parameters.factor} is below 1")

    @property
    def key_value_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads


@dataclass
class TextConfig:
    """ModernBERT (arXiv 2412.13663), of which token 0 after layer `nth_text_layer` is the text feature."""

    vocab_size: int = 50_368
    hidden_size: int = 1024
    intermediate_size: int = 2624
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8192
    global_attn_every_n_layers: int = 3  # layers 0, 3, 6, … see everything
    local_attention: int = 128  # the others see |i − j| <= local_attention / 2
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    pad_token_id: int = 50_283
    nth_text_layer: int = 22  # 1 … num_hidden_layers; what comes after it is kept for exchange and frozen
    max_tokens: int = 512  # the longest caption that the processor passes on

    def __post_init__(self) -> None:
        require(
            self.hidden_size % (2 * self.num_attention_heads) == 0,
            f"text hidden_size={self.hidden_size} does not give {self.num_attention_heads} heads of even width",
        )
        require(
            1 <= self.nth_text_layer <= self.num_hidden_layers,
            f"nth_text_layer={self.nth_text_layer} is not in 1 … num_hidden_layers={self.num_hidden_layers}",
        )
        require(
            self.max_tokens <= self.max_position_embeddings,
            f"max_tokens={self.max_tokens} is beyond max_position_embeddings={self.max_position_embeddings}",
        )
        require(0 <= self.pad_token_id < self.vocab_size, f"pad_token_id={self.pad_token_id} is not in the vocabulary")
        one_of("hidden_act", self.hidden_act, ACTIVATIONS)


@dataclass
class CodecConfig:
    """DAC-VAE encoder (arXiv 2306.06546): waveform to latent frames."""

    sampling_rate: int = 48_000  # Hz
    encoder_hidden_size: int = 64  # doubles at every stage
    downsampling_ratios: list[int] = field(default_factory=lambda: [2, 8, 10, 12])
    codebook_dim: int = 128  # width of the latent mean, which is what the audio transformer reads
    trainable: bool = False  # published checkpoints freeze it
    tile_seconds: float | None = None  # encode in tiles of this length, smaller and on CPU faster; None: in one piece

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        hop = 1
        for ratio in self.downsampling_ratios:
            hop *= ratio
        return hop


@dataclass
class VisionConfig:
    """PE-Core vision transformer (arXiv 2504.13181); the defaults are PE-Core-L14-336."""

    image_size: int = 336  # pixels, square
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    output_dim: int = 1024
    proj_bias: bool = False  # of the projection to output_dim: the original has none, transformers one that starts at 0
    use_class_token: bool = True
    pool_heads: int = 8  # heads of the attention pooling
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        require(
            self.image_size % self.patch_size == 0,
            f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}",
        )
        require(
            self.hidden_size % (4 * self.num_attention_heads) == 0,
            f"vision hidden_size={self.hidden_size} does not give {self.num_attention_heads} heads of a width "
            "divisible by 4, which 2-D rotary embedding needs",
        )
        require(
            self.hidden_size % self.pool_heads == 0,
            f"vision hidden_size={self.hidden_size} is not a multiple of pool_heads={self.pool_heads}",
        )


@dataclass
class AudioConfig:
    codec: CodecConfig = field(default_factory=CodecConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)


@dataclass
class VideoConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    transformer: TransformerConfig = field(default_factory=lambda: TransformerConfig(num_hidden_layers=4))
    num_frames: int | None = None  # frames spread evenly over the clip, as the 16-frame models want; None: every frame
    frames_per_second: float | None = None  # instead of num_frames: sample at this rate

    def __post_init__(self) -> None:
        require(
            self.num_frames is None or self.frames_per_second is None,
            "num_frames and frames_per_second are both set: a model samples frames one way; set one to null",
        )
        require(self.num_frames is None or self.num_frames >= 1, f"num_frames={self.num_frames} is not positive")
        require(
            self.frames_per_second is None or self.frames_per_second > 0,
            f"frames_per_second={self.frames_per_second} is not positive",
        )


@dataclass
class ModelConfig:
    """PE-AV: three towers, a fusion of two of them, eight heads, six scales and biases."""

    text: TextConfig = field(default_factory=TextConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    fusion: TransformerConfig = field(default_factory=lambda: TransformerConfig(num_hidden_layers=6))
    heads: list[str] = field(default_factory=lambda: list(HEADS))  # the embeddings; parts that none needs are not built
    output_dim: int = 1024  # width of the shared space
    attention: str = "sdpa"  # eager (can return the weights) | sdpa | flex
    logit_scale_init: float = 10.0  # s and b of every pairing at the start (arXiv 2303.15343, section 3.2)
    logit_bias_init: float = -10.0

    def __post_init__(self) -> None:
        for name in self.heads:
            one_of("heads", name, list(HEADS))
        require(len(set(self.heads)) == len(self.heads) > 0, f"heads={self.heads} is empty or names one twice")
        parts = {"text": self.text, "audio": self.audio.transformer, "video": self.video.transformer}
        _check_attention(self.attention, parts | {"fusion": self.fusion})

    @property
    def towers(self) -> tuple[str, ...]:
        """The parts that some head needs."""
        return tuple(tower for tower in TOWERS if any(tower in HEADS[name] for name in self.heads))

    def keep(self, towers: Sequence[str]) -> "ModelConfig":
        """The same model without the heads, and so without the parts, that need more than `towers`.

        Raises:
            ConfigError: an unknown part, one that this model does not have, or none whose head would be left.
        """
        for tower in towers:
            one_of("towers", tower, TOWERS)
            require(tower in self.towers, f"towers={tower}: this model has only {', '.join(self.towers)}")
        heads = [name for name in self.heads if set(HEADS[name]) <= set(towers)]
        require(bool(heads), f"towers={tuple(towers)} leave no embedding; fusion needs audio and video")
        return replace(self, heads=heads)


@dataclass
class FrameConfig:
    """PE-A-Frame: text and audio towers, and an embedding for every audio frame."""

    text: TextConfig = field(default_factory=TextConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    output_dim: int = 1024  # width of the shared space
    attention: str = "sdpa"  # eager | sdpa | flex
    logit_scale_init: float = 10.0
    logit_bias_init: float = -10.0

    def __post_init__(self) -> None:
        _check_attention(self.attention, {"text": self.text, "audio": self.audio.transformer})


ARCHITECTURES = {"PEAudioVideo": ModelConfig, "PEAudioFrame": FrameConfig}  # the names stand in checkpoints


# ---------------------------------------------------------------------------------------------------------------------
# data, loss, training, evaluation


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
    # instead of train: tar shards that are read one after the other, as s3://bucket/{000..127}.tar (data/stream.py)
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
class FrameDemoConfig:
    """Sounds at different times, and the caption of one of them (data/frame_demo.py)."""

    root: str = "data/frame_demo"
    seed: int = 0
    train_clips: int = 480
    eval_clips: int = 96

    def __post_init__(self) -> None:
        require(min(self.train_clips, self.eval_clips) >= 1, "demo: train_clips and eval_clips must be positive")
        require(self.seed >= 0, f"demo.seed={self.seed} is negative")


@dataclass
class FrameTrainConfig(RunConfig):
    """`python -m pe_av.training.frame`: PEAudioFrame from recordings with captions and the times they are about."""

    model: FrameConfig = field(default_factory=FrameConfig)
    train: str | None = None  # JSONL of {"path", "caption", "spans": [[start_s, end_s], …]}; None: the demo
    eval: str | None = None
    demo: FrameDemoConfig = field(default_factory=FrameDemoConfig)
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


def nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(known)}"


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    require(value in known, f"{name}={value} is unknown{nearest(str(value), known)}")


def _check_attention(attention: str, parts: dict[str, TransformerConfig | TextConfig]) -> None:
    one_of("attention", attention, ATTENTIONS)
    for name, part in parts.items():
        require(
            attention != "flex" or part.attention_dropout == 0,
            f"{name}: attention_dropout={part.attention_dropout} needs attention=sdpa or eager; flex has none",
        )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
