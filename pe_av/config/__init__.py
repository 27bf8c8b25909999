"""Every setting, as dataclasses that the YAML under `configs/` is checked against.

The settings are in model.py, data.py, run.py and evaluation.py; checks.py has the checks that they share, and
compose.py reads settings from YAML and the command line. Nothing here imports torch.
"""

from pe_av.config.checks import ConfigError, nearest, one_of, require
from pe_av.config.data import DataConfig, DemoConfig, MixConfig, SpanDemoConfig, StampsConfig, WindowsConfig
from pe_av.config.evaluation import AppConfig, EmbedConfig, EvalConfig, RayEmbedConfig
from pe_av.config.model import (
    ACTIVATIONS,
    ARCHITECTURES,
    ATTENTIONS,
    CAPTIONS,
    HEADS,
    PAIRINGS,
    TOWERS,
    AudioConfig,
    CodecConfig,
    ModelConfig,
    PEAudioFrameConfig,
    RopeConfig,
    TextConfig,
    TransformerConfig,
    VideoConfig,
    VisionConfig,
)
from pe_av.config.run import (
    ConvertConfig,
    InitConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    Pairing,
    ParallelConfig,
    RunConfig,
    SpanTrainConfig,
    TrainConfig,
)

__all__ = [
    "ACTIVATIONS", "ARCHITECTURES", "ATTENTIONS", "CAPTIONS", "HEADS", "PAIRINGS", "TOWERS", "AppConfig", "AudioConfig",
    "CodecConfig", "ConfigError", "ConvertConfig", "DataConfig", "DemoConfig", "EmbedConfig", "EvalConfig",
    "InitConfig", "LoraConfig", "LossConfig", "MixConfig", "ModelConfig", "OptimConfig", "PEAudioFrameConfig",
    "Pairing", "ParallelConfig", "RayEmbedConfig", "RopeConfig", "RunConfig", "SpanDemoConfig", "SpanTrainConfig",
    "StampsConfig", "TextConfig", "TrainConfig", "TransformerConfig", "VideoConfig", "VisionConfig", "WindowsConfig",
    "nearest", "one_of", "require",
]  # fmt: skip
