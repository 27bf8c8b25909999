"""A small model, random weights and inputs for it, and how far two tensors are apart."""

import os
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: as many workers as cores run already

import pytest
import torch
from torch import Tensor, nn

from pe_av.config import AudioConfig, CodecConfig, ModelConfig, TextConfig, TransformerConfig, VideoConfig, VisionConfig

ROWS = ((24, 12, 5), (9, 5, 8), (15, 7, 3))  # tokens, codec frames, video frames: every input has another longest row


# files that take a minute or more: they start first, or one would run alone at the end
LONG = ["test_matrix", "test_training", "test_parallel", "test_resume", "test_frame_training", "test_stream"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def small_config() -> ModelConfig:
    """Two to four layers, another width in every part, so that no two can be mistaken for each other."""
    return ModelConfig(
        text=TextConfig(
            vocab_size=300,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            local_attention=8,
            max_position_embeddings=64,
            max_tokens=64,
            pad_token_id=0,
            nth_text_layer=4,  # two layers that see everything, two that see |i − j| <= 4, and one that is never run
        ),
        audio=AudioConfig(
            CodecConfig(encoder_hidden_size=4, codebook_dim=12),
            TransformerConfig(
                hidden_size=40,
                intermediate_size=56,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
            ),
        ),
        video=VideoConfig(
            VisionConfig(
                image_size=32,
                patch_size=8,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                output_dim=20,
                pool_heads=4,
            ),
            TransformerConfig(
                hidden_size=36, intermediate_size=60, num_hidden_layers=1, num_attention_heads=3, head_dim=12
            ),
        ),
        fusion=TransformerConfig(
            hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, head_dim=16
        ),
        output_dim=28,
    )


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights with which every parameter matters: no bias or norm that does nothing, no layer close to the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "alpha" in name:
            value = 1 + 0.3 * noise.abs()
        elif parameter.dim() == 1 and "weight" in name:
            value = 1 + 0.3 * noise
        elif parameter.dim() == 1 or parameter.shape[:2] == (1, 1):  # biases, class tokens, probes
            value = 0.3 * noise
        else:
            value = noise * noise[0].numel() ** -0.5
        parameter.copy_(value)
    return module


def random_batch(
    config: ModelConfig, rows: Sequence[tuple[int, int, int]] = ROWS, seed: int = 0, loudness: float = 1.0
) -> dict[str, Tensor]:
    """Inputs of several lengths, padded to the longest.

    Args:
        rows: tokens, codec frames and video frames of each row.
        loudness: of the noise that stands where padding is, relative to what is valid.
    """
    generator = torch.Generator().manual_seed(seed)
    hop, size = config.audio.codec.hop_length, config.video.vision.image_size
    tokens, hops, frames = (torch.tensor(lengths) for lengths in zip(*rows, strict=True))
    batch = {
        "input_ids": torch.randint(config.text.vocab_size, (len(rows), int(tokens.max())), generator=generator),
        "attention_mask": _mask(tokens),
        "input_values": 0.1 * torch.randn(len(rows), 1, hop * int(hops.max()), generator=generator),
        "padding_mask": _mask(hops * hop),
        "pixel_values_videos": torch.randn(len(rows), int(frames.max()), 3, size, size, generator=generator),
        "padding_mask_videos": _mask(frames),
    }
    batch["input_values"][~batch["padding_mask"][:, None]] *= loudness
    batch["pixel_values_videos"][~batch["padding_mask_videos"]] *= loudness
    return batch


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Row `row` by itself: nothing padded, no masks."""
    tokens, samples, frames = (
        int(batch[name][row].sum()) for name in ("attention_mask", "padding_mask", "padding_mask_videos")
    )
    return {
        "input_ids": batch["input_ids"][row : row + 1, :tokens],
        "input_values": batch["input_values"][row : row + 1, :, :samples],
        "pixel_values_videos": batch["pixel_values_videos"][row : row + 1, :frames],
    }


def in_double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in float64; tensors of different shape are an error, not broadcast."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()


def _mask(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max())) < lengths[:, None]
