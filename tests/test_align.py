"""Nearest-neighbour alignment against `torch.nn.functional.interpolate`, for every pair of lengths up to 24 seconds."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error, small_config

from pe_av.model.align import align, nearest_index
from pe_av.model.build import build_temporal
from pe_av.model.fusion import FusionEncoder

MOST = 600  # 24 s of audio at 25 per second


def test_every_pair_of_lengths_reads_the_frames_that_interpolate_reads():
    """All 360,000 pairs: which frame is nearest hangs on how float32 rounds the ratio of the two lengths."""
    targets = torch.arange(1, MOST + 1)
    valid = torch.arange(MOST) < targets[:, None]
    for frames in range(1, MOST + 1):
        index = nearest_index(torch.full_like(targets, frames), targets, MOST)
        clip = torch.arange(frames, dtype=torch.float32)[None, None]
        expected = [F.interpolate(clip, size=steps, mode="nearest")[0, 0] for steps in range(1, MOST + 1)]
        assert torch.equal(index[valid].float(), torch.cat(expected)), f"{frames} frames"
        assert index.max() < frames  # behind a row's end too, where `gather` would read out of bounds
        assert (index.max(dim=1).values[:, None] == index)[~valid].all()


@pytest.mark.parametrize("frames", [1, 7, 40])
def test_rows_of_different_lengths(frames: int):
    """Each row from its own valid frames to its own valid steps; what stands behind either end is not read."""
    video_length = torch.tensor([frames, max(1, frames // 2), 1, frames])
    audio_length = torch.tensor([30, 30, 17, 1])
    video = torch.randn(4, frames, 5)
    video[torch.arange(frames) >= video_length[:, None]] = torch.nan
    aligned = align(video, nearest_index(video_length, audio_length, 30))
    assert aligned.shape == (4, 30, 5)
    assert aligned.isfinite().all()
    for row, (source, target) in enumerate(zip(video_length.tolist(), audio_length.tolist(), strict=True)):
        expected = F.interpolate(video[row : row + 1, :source].transpose(1, 2), size=target, mode="nearest")
        assert torch.equal(aligned[row, :target], expected[0].T)


def test_fusion_aligns_rows_even_where_the_padded_lengths_are_equal():
    """transformers 5.23 skips the alignment there; a row's 3 frames then stand beside its first 3 of 8 steps."""
    config = small_config()
    fusion = randomize(FusionEncoder(build_temporal(config.fusion, "sdpa"), 40, 36, 64)).eval()
    audio, video = torch.randn(2, 8, 40), torch.randn(2, 8, 36)
    audio_mask = torch.ones(2, 8, dtype=torch.bool)
    video_mask = torch.arange(8) < torch.tensor([[8], [3]])
    with torch.inference_mode():
        pooled, sequence, _ = fusion(audio, video, audio_mask, video_mask)
        pooled_alone, sequence_alone, _ = fusion(audio[1:], video[1:, :3])
    assert relative_error(pooled[1], pooled_alone[0]) <= 2e-6
    assert relative_error(sequence[1], sequence_alone[0]) <= 2e-6
