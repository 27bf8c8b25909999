"""The settings of the models: one dataclass per module. The defaults are those of the published `large` model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pe_av.config.checks import as_yaml, one_of, require

# (left, right) embeddings of each pairing: the rows of `logits_<pairing>` are the left ones
PAIRINGS: dict[str, tuple[str, str]] = {
    "audio_text": ("audio", "text_audio"),
    "video_text": ("video", "text_video"),
    "audio_video": ("audio", "video"),
    "audio_video_text": ("audio_video", "text_audio_video"),
    "audio_plus_text_video": ("audio_plus_text", "video"),
    "video_plus_text_audio": ("video_plus_text", "audio"),
}

# the towers that each embedding is made with
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

# kinds of caption: of what is heard, of what is seen, and of both
CAPTIONS = ("audio", "visual", "audio_visual")

ATTENTIONS = ("eager", "sdpa", "flex")

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")  # the names that published configs use


@dataclass
class RopeConfig:
    """Rotary position embedding of a temporal transformer."""

    __repr__ = as_yaml

    # default | linear (positions are divided by `factor`) | dynamic (the base grows with inputs beyond the maximum)
    rope_type: str = "default"
    rope_theta: float = 20_000.0  # The base of the angles.
    factor: float = 1.0  # Used by linear and dynamic.


@dataclass
class TransformerConfig:
    """The transformer over time that the audio, video and fusion towers have (paper, section 3)."""

    __repr__ = as_yaml

    hidden_size: int = 1792
    intermediate_size: int = 4800  # The width of the gated MLP.
    num_hidden_layers: int = 28
    num_attention_heads: int = 14
    num_key_value_heads: int | None = None  # Fewer than attention heads: grouped-query attention; null: as many.
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 10_000  # Positions, including the class token: 400 s at 25 per second.
    initializer_range: float = 0.02  # Weights start from a normal distribution with this standard deviation.
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
    """ModernBERT (arXiv 2412.13663). Its output at token 0, after layer `nth_text_layer`, is the text feature."""

    __repr__ = as_yaml

    vocab_size: int = 50_368
    hidden_size: int = 1024
    intermediate_size: int = 2624
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8192
    global_attn_every_n_layers: int = 3  # Layers 0, 3, 6, … attend to all tokens.
    local_attention: int = 128  # The other layers attend to tokens with |i − j| <= local_attention / 2.
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    pad_token_id: int = 50_283
    nth_text_layer: int = 22  # 1 … num_hidden_layers. Later layers are frozen, and kept only for conversion.
    max_tokens: int = 512  # The processor cuts captions to this many tokens.

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
    """The DAC-VAE encoder (arXiv 2306.06546): from a waveform to positions."""

    __repr__ = as_yaml

    sampling_rate: int = 48_000  # In Hz.
    encoder_hidden_size: int = 64  # The width of the first stage; every stage doubles it.
    downsampling_ratios: list[int] = field(default_factory=lambda: [2, 8, 10, 12])
    codebook_dim: int = 128  # The width of the latent mean, which is the input of the audio transformer.
    trainable: bool = False  # Whether it is trained; in published checkpoints it is frozen.
    # A frozen codec encodes in tiles of this many seconds, which bounds its memory; null: 10 s.
    tile_seconds: float | None = None

    @property
    def hop_length(self) -> int:
        """Samples per position."""
        hop = 1
        for ratio in self.downsampling_ratios:
            hop *= ratio
        return hop


@dataclass
class VisionConfig:
    """The PE-Core vision transformer (arXiv 2504.13181). The defaults are those of PE-Core-L14-336."""

    __repr__ = as_yaml

    image_size: int = 336  # Width and height of a frame, in pixels.
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    output_dim: int = 1024
    # Whether the projection to output_dim has a bias. The original has none; transformers adds one, which starts at 0.
    proj_bias: bool = False
    use_class_token: bool = True
    pool_heads: int = 8  # The heads of the attention pooling.
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
    __repr__ = as_yaml

    codec: CodecConfig = field(default_factory=CodecConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)


@dataclass
class VideoConfig:
    __repr__ = as_yaml

    vision: VisionConfig = field(default_factory=VisionConfig)
    transformer: TransformerConfig = field(default_factory=lambda: TransformerConfig(num_hidden_layers=4))
    # Use this many frames, spread evenly over the clip, as the 16-frame models do; null: use every frame.
    num_frames: int | None = None
    frames_per_second: float | None = None  # Instead of num_frames: sample frames at this rate.

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
    """PE-AV: text, audio and video towers, a fusion of audio and video, eight heads, six logit scales and biases."""

    __repr__ = as_yaml

    text: TextConfig = field(default_factory=TextConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    fusion: TransformerConfig = field(default_factory=lambda: TransformerConfig(num_hidden_layers=6))
    heads: list[str] = field(
        default_factory=lambda: list(HEADS)
    )  # The embeddings. Towers that none needs are not built.
    output_dim: int = 1024  # The width of the embeddings.
    attention: str = "sdpa"  # eager (can return attention weights) | sdpa | flex
    logit_scale_init: float = 10.0  # Scale s and bias b of each pairing at the start (arXiv 2303.15343, section 3.2).
    logit_bias_init: float = -10.0

    def __post_init__(self) -> None:
        for name in self.heads:
            one_of("heads", name, list(HEADS))
        require(len(set(self.heads)) == len(self.heads) > 0, f"heads={self.heads} is empty or names one twice")
        parts = {"text": self.text, "audio": self.audio.transformer, "video": self.video.transformer}
        _check_attention(self.attention, parts | {"fusion": self.fusion})

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers that some head needs."""
        return tuple(tower for tower in TOWERS if any(tower in HEADS[name] for name in self.heads))

    def keep(self, towers: Sequence[str]) -> "ModelConfig":
        """The same model with only those heads that `towers` are enough for.

        Raises:
            ConfigError: there is no such tower, this model does not have it, or no head would be left.
        """
        for tower in towers:
            one_of("towers", tower, TOWERS)
            require(tower in self.towers, f"towers={tower}: this model has only {', '.join(self.towers)}")
        heads = [name for name in self.heads if set(HEADS[name]) <= set(towers)]
        require(bool(heads), f"towers={tuple(towers)} leave no embedding; fusion needs audio and video")
        return replace(self, heads=heads)


@dataclass
class PEAudioFrameConfig:
    """PE-A-Frame: text and audio towers, with an embedding for every position of the audio."""

    __repr__ = as_yaml

    text: TextConfig = field(default_factory=TextConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    output_dim: int = 1024  # The width of the embeddings.
    attention: str = "sdpa"  # eager (can return attention weights) | sdpa | flex
    logit_scale_init: float = 10.0
    logit_bias_init: float = -10.0

    def __post_init__(self) -> None:
        _check_attention(self.attention, {"text": self.text, "audio": self.audio.transformer})


# by the name that stands under `architecture` in a checkpoint's config.yaml
ARCHITECTURES = {"PEAudioVideo": ModelConfig, "PEAudioFrame": PEAudioFrameConfig}


def _check_attention(attention: str, parts: dict[str, TransformerConfig | TextConfig]) -> None:
    one_of("attention", attention, ATTENTIONS)
    for name, part in parts.items():
        require(
            attention != "flex" or part.attention_dropout == 0,
            f"{name}: attention_dropout={part.attention_dropout} needs attention=sdpa or eager; flex has no dropout",
        )
