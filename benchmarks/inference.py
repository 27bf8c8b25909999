"""The cases in which ours and transformers' model are timed: codec, frames, text, audio transformer, whole forward.

    python -m benchmarks inference [codec frames text audio forward] [--preset small] [--dtype bfloat16] …

The peer computes in `--peer-dtype`, float32 unless said otherwise; "autocast" keeps its weights in float32 and computes
in bfloat16. `--compile` compiles our blocks. A GPU gets larger batches. Ragged batches are padded to their longest
row, as both processors make them; ours is compared where the input is valid.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.peer import (
    Case,
    Pair,
    compare,
    pair,
    positive,
    report,
    their_audio,
    their_codec,
    their_frames,
    their_text,
)
from pe_av.device import pick_device

HOP, RATE = 1920, 48_000
DTYPES = ["float32", "bfloat16", "float16"]


def codec(models: Pair) -> Iterator[Case]:
    """Waveform to latents. A padded row is another one in transformers, so ragged rows are compared one by one."""
    ours, theirs = models.ours.audio.codec, models.theirs
    dtype = ours.to_mean.weight.dtype
    gpu = models.device.type == "cuda"
    whole = _noise(models, 32 if gpu else 1, 10)
    yield Case(
        "32 × 10 s" if gpu else "10 s",
        lambda: ours(whole.to(dtype)),
        lambda: their_codec(theirs, whole),
        tolerance=_tolerance(dtype),
    )
    seconds = torch.linspace(1, 10, 32).long().tolist() if gpu else (1, 10, 30)
    ragged, mask = _noise(models, len(seconds), max(seconds)), _mask(models, [25 * s for s in seconds])
    # the last ten positions of a row hear the padding in transformers
    heard = _mask(models, [25 * s - 10 if s < max(seconds) else 25 * s for s in seconds], 25 * max(seconds))
    yield Case(
        "32 clips of 1–10 s" if gpu else "3 clips of 1–30 s",
        lambda: ours(ragged.to(dtype), mask),
        lambda: their_codec(theirs, ragged),
        heard,
        _tolerance(dtype),
    )


def frames(models: Pair) -> Iterator[Case]:
    """Frames to features of unit length."""
    tower, theirs = models.ours.video, models.theirs
    dtype, size = tower.proj.weight.dtype, tower.vision.image_size
    clips, count = (16, 16) if models.device.type == "cuda" else (1, 4)
    pixels = torch.rand(clips, count, 3, size, size, device=models.device) * 2 - 1
    yield Case(
        f"{clips * count} frames",
        lambda: tower.encode(pixels.to(dtype)),
        lambda: their_frames(theirs, pixels),
        tolerance=_tolerance(dtype),
    )
    ragged = torch.rand(count, count, 3, size, size, device=models.device) * 2 - 1
    mask = _mask(models, list(range(1, count + 1)))
    yield Case(
        f"{count} clips of 1–{count} frames",
        lambda: tower.encode(ragged.to(dtype), mask),
        lambda: their_frames(theirs, ragged),
        mask,
        _tolerance(dtype),
    )


def text(models: Pair) -> Iterator[Case]:
    """Token ids to the sequence that the text feature is taken from."""
    ours, theirs = models.ours, models.theirs
    dtype = ours.heads["audio"].proj.weight.dtype
    ragged, whole = (256, 256) if models.device.type == "cuda" else (32, 16)
    for name, lengths in {
        f"{ragged} captions of 5–200 tokens": torch.linspace(5, 200, ragged).long().tolist(),
        f"{whole} × 64": [64] * whole,
    }.items():
        ids = torch.randint(5, ours.config.text.vocab_size, (len(lengths), max(lengths)), device=models.device)
        mask = _mask(models, lengths)
        yield Case(
            name,
            lambda ids=ids, mask=mask: ours.text(ids, mask)[0][:, 0],
            lambda ids=ids, mask=mask: their_text(theirs, ids, mask),
            tolerance=_tolerance(dtype),
        )


def audio(models: Pair) -> Iterator[Case]:
    """Codec features to the pooled output of the audio tower."""
    tower, theirs = models.ours.audio, models.theirs
    dtype = tower.data_proj.weight.dtype
    times = 8 if models.device.type == "cuda" else 1
    for name, lengths in {
        f"{8 * times} clips of 1–10 s": [25, 50, 75, 100, 125, 175, 225, 250] * times,
        f"{8 * times} × 10 s": [250] * 8 * times,
    }.items():
        features = torch.randn(8 * times, 250, tower.data_proj.in_features, device=models.device)
        mask = _mask(models, lengths)
        yield Case(
            name,
            lambda features=features, mask=mask: tower(features.to(dtype), mask)[0],
            lambda features=features, mask=mask: their_audio(theirs, features, mask),
            tolerance=_tolerance(dtype),
        )


def forward(models: Pair) -> Iterator[Case]:
    """Waveforms, frames and captions to all eight embeddings and six logits."""
    ours, theirs = models.ours, models.theirs
    dtype, size = ours.heads["audio"].proj.weight.dtype, ours.video.vision.image_size
    vocabulary, times = ours.config.text.vocab_size, 8 if models.device.type == "cuda" else 1
    for name, lengths in {
        f"{2 * times} clips of 10 s, 16 frames, 64 tokens": ([250] * 2, [16] * 2, [64] * 2),
        f"{4 * times} clips of 1–10 s, 4–16 frames, 5–200 tokens": (
            [25, 75, 150, 250],
            [4, 8, 12, 16],
            [5, 40, 100, 200],
        ),
    }.items():
        seconds, pictures, tokens = (one * times for one in lengths)
        batch = {
            "input_ids": torch.randint(5, vocabulary, (len(tokens), max(tokens)), device=models.device),
            "attention_mask": _mask(models, tokens),
            "input_values": 0.1 * torch.randn(len(seconds), 1, max(seconds) * HOP, device=models.device),
            "padding_mask": _mask(models, [s * HOP for s in seconds]),
            "pixel_values_videos": torch.rand(len(pictures), max(pictures), 3, size, size).to(models.device) * 2 - 1,
            "padding_mask_videos": _mask(models, pictures),
        }

        def embeds(model, batch: dict[str, Tensor] = batch) -> Tensor:
            kind = next(model.parameters()).dtype
            inputs = {n: v.to(kind) if v.is_floating_point() else v for n, v in batch.items()}
            return model(**inputs).text_audio_embeds  # the one that padding leaves alone in both

        yield Case(name, lambda f=embeds: f(ours), lambda f=embeds: f(theirs), tolerance=_tolerance(dtype))


CASES: dict[str, Callable[[Pair], Iterator[Case]]] = {
    "codec": codec,
    "frames": frames,
    "text": text,
    "audio": audio,
    "forward": forward,
}


def _noise(models: Pair, rows: int, seconds: int) -> Tensor:
    return 0.1 * torch.randn(rows, 1, seconds * RATE, device=models.device)


def _mask(models: Pair, lengths: list[int] | tuple[int, ...], size: int | None = None) -> Tensor:
    lengths = torch.tensor(lengths, device=models.device)
    return torch.arange(size or int(lengths.max()), device=models.device) < lengths[:, None]


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 0.05


def _autocast(case: Case, device: torch.device) -> Case:
    """The same, with the peer under bfloat16 autocast."""

    def theirs() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return case.theirs()

    return replace(case, theirs=theirs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks inference", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of ours")
    parser.add_argument("--peer-dtype", default="float32", choices=[*DTYPES, "autocast"])
    parser.add_argument("--compile", action="store_true", help="our blocks")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--budget", type=float, default=60, help="seconds of a case after which no more repeats begin")
    options = parser.parse_args()
    subjects = options.subjects or list(CASES)
    if unknown := set(subjects) - CASES.keys():
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(CASES)}")
    device = pick_device(options.device)
    autocast = options.peer_dtype == "autocast"
    dtype, peer_dtype = getattr(torch, options.dtype), torch.float32 if autocast else getattr(torch, options.peer_dtype)
    setting = {"preset": options.preset, "dtype": options.dtype, "peer_dtype": options.peer_dtype}
    setting |= {"compiled": True} if options.compile else {}
    with pair(options.preset, device, dtype, peer_dtype) as models:
        for block in models.ours.blocks() if options.compile else []:
            block.compile(dynamic=True)
        for subject in subjects:
            cases = (_autocast(case, device) if autocast else case for case in CASES[subject](models))
            rows = [compare(case, device, dtype, options.repeats, options.budget) for case in cases]
            report(subject, rows, setting, device)


if __name__ == "__main__":
    main()
