"""The data loader in figures: `python benchmarks/loader.py [throughput] [padding] [memory] [wait] [cache]`.

- throughput: clips/s of the loader beside the plain loop `decord + PyAV + transform` in one process.
- padding: the part of all audio positions that is padding, on 1 to 30 s, with batches of like length and at random.
- memory: of the main process and the workers while 100,000 small items pass.
- wait: the part of the time of a training run on the demo world in which the step waits for data.
- cache: seconds per training step with cached features and without, at `--preset`.

Without names: the first three.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torchvision.transforms.v2.functional as VF

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, installed or not

from pe_av.config import ModelConfig
from pe_av.config.compose import load_preset
from pe_av.data.clips import ClipReader
from pe_av.data.manifest import Clip, Manifest
from pe_av.loading.batch import Collate
from pe_av.loading.loader import Loader
from pe_av.loading.sampler import BatchSampler
from pe_av.media.audio import pad_to_hops, resample
from pe_av.media.processor import Processor
from pe_av.media.tokenizer import train_tokenizer

FRAMES = 16


def write_clip(path: Path, seconds: int, height: int, width: int) -> None:
    """A moving gradient with grain at 25 frames per second, and 44.1 kHz stereo."""
    chance = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(height), np.arange(width))
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "g": "50"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=44_100, layout="stereo")
        for index in range(25 * seconds):
            grain = chance.integers(0, 20, (height, width, 3))
            pixels = ((ramp[..., None] + 7 * index) % 230 + grain).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        samples = chance.uniform(-0.3, 0.3, (2, 44_100 * seconds)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate, frame.time_base, frame.pts = 44_100, Fraction(1, 44_100), 0
        container.mux(audio.encode(frame))
        for stream in (video, audio):
            container.mux(stream.encode(None))


def plain_loop(paths: list[str], size: int) -> None:
    """What one would write first."""
    import decord

    for path in paths:
        reader = decord.VideoReader(path, num_threads=1)
        index = [i * (len(reader) - 1) // (FRAMES - 1) for i in range(FRAMES)]
        frames = torch.from_numpy(reader.get_batch(index).asnumpy()).permute(0, 3, 1, 2)
        VF.resize(frames, [size, size], VF.InterpolationMode.BILINEAR, antialias=True)
        with av.open(path) as container:
            blocks = [torch.from_numpy(frame.to_ndarray()) for frame in container.decode(audio=0)]
        pad_to_hops(resample(torch.cat(blocks, 1).mean(0), 44_100, 48_000), 1920)


def throughput(clips: int, workers: int, rounds: int) -> dict[str, object]:
    torch.set_num_threads(1)
    config = ModelConfig()
    config.video.num_frames = FRAMES
    size = config.video.vision.image_size
    processor = Processor(config, train_tokenizer(["a clip"], 300))
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.mp4" for i in range(clips)]
        write_clip(Path(paths[0]), 10, 360, 640)
        for path in paths[1:]:
            os.link(paths[0], path)
        manifest = Manifest.of(Clip(str(i), path, path, {None: ["a clip"]}) for i, path in enumerate(paths))
        sampler = BatchSampler(clips, 8)
        loader = Loader(manifest, ClipReader(processor, 30.0), sampler, Collate(processor), workers, 60.0)
        for _ in loader:  # the workers start
            pass
        seconds: dict[str, list[float]] = {"loop": [], "loader": []}
        for _ in range(rounds):  # by turns, so that both see the same machine
            started = time.perf_counter()
            plain_loop(paths, size)
            seconds["loop"].append(time.perf_counter() - started)
            started = time.perf_counter()
            assert sum(len(batch["ids"]) for batch in loader) == clips
            seconds["loader"].append(time.perf_counter() - started)
        loader.close()
    rates = {name: clips / float(np.median(times)) for name, times in seconds.items()}
    return {f"{name}_clips_per_second": rate for name, rate in rates.items()} | {
        "times_faster": rates["loader"] / rates["loop"], "workers": workers, "load": os.getloadavg()[0],
    }  # fmt: skip


def padding() -> dict[str, float]:
    lengths = np.random.default_rng(0).uniform(1, 30, 50_000)
    tokens = np.ceil(25 * lengths)

    def waste(**how) -> float:
        batches = list(BatchSampler(len(lengths), 32, shuffle=True, **how).epoch(0))
        return 1 - sum(tokens[b].sum() for b in batches) / sum(len(b) * tokens[b].max() for b in batches)

    return {
        "waste_at_random": waste(),
        "waste_of_like_length": waste(lengths=lengths),
        "waste_with_token_budget": waste(lengths=lengths, max_tokens=8000),
    }


def small_item(clip: Clip) -> dict[str, object]:
    return {"id": clip.id, "captions": clip.captions, "waveform": torch.zeros(1920)}


def resident(process: int) -> float:
    """MiB of a process that are its own."""
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_")) / 1024


def memory(samples: int, workers: int) -> dict[str, object]:
    config = load_preset("tiny")
    processor = Processor(config, train_tokenizer(["a clip"], 300))
    manifest = Manifest.of(Clip(f"clip {i}", f"{i}.wav", None, {None: [f"caption {i}"]}) for i in range(samples // 4))
    sampler = BatchSampler(len(manifest), 64, shuffle=True)
    loader = Loader(manifest, small_item, sampler, Collate(processor), workers, 60.0)
    curve, seen, batches = [], 0, 0
    while seen < samples:
        for batch in loader:
            seen, batches = seen + len(batch["ids"]), batches + 1
            if batches % (samples // 64 // 10) == 0:
                children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
                below = [
                    c for child in children for c in Path(f"/proc/{child}/task/{child}/children").read_text().split()
                ]
                own = [resident(int(process)) for process in below]
                curve.append([seen, round(resident(os.getpid()), 1), round(sum(own), 1)])
            if seen >= samples:
                break
    loader.close()
    return {"samples_main_MiB_workers_MiB": curve}


def wait(steps: int, workers: int) -> dict[str, float]:
    """The demo with clips decoded every time, and with clips kept in memory, as its preset does."""
    from pe_av.config import DataConfig, DemoConfig, TrainConfig
    from pe_av.training.contrastive import Contrastive
    from pe_av.training.trainer import Trainer

    found = {}
    for in_memory in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            data = DataConfig(demo=DemoConfig(), in_memory=in_memory, num_workers=workers)
            config = TrainConfig(model=load_preset("tiny"), data=data, steps=steps, eval_every=steps, log_every=steps)
            run = Trainer(config, Path(folder), torch.device("cpu"), Contrastive)
            run.train()
            found["in_memory" if in_memory else "decoding"] = run.log.rows[-1]["data_wait"]
    return found


def cache(preset: str, device: str, batch: int, steps: int) -> dict[str, object]:
    """A step on features against a step on waveforms and frames, both with codec and frame encoder frozen."""
    from pe_av.checkpoint import build_model

    config = load_preset(preset)
    config.audio.codec.tile_seconds = 1.0
    model = build_model(config, device).train()
    model.video.vision.requires_grad_(False)
    chance = torch.Generator().manual_seed(0)
    seconds, hop, size = 10, config.audio.codec.hop_length, config.video.vision.image_size
    frames = config.video.num_frames or FRAMES
    text = torch.randint(5, 200, (batch, 12), generator=chance)
    raw = {
        "input_values": torch.randn(batch, 1, 25 * seconds * hop, generator=chance) / 10,
        "pixel_values_videos": torch.randn(batch, frames, 3, size, size, generator=chance),
    }
    raw = {name: value.to(device) for name, value in raw.items()}
    with torch.no_grad():
        features = {
            "codec_features": torch.cat([model.audio.encode(row[None])[0] for row in raw["input_values"]]),
            "frame_features": torch.cat([model.video.encode(row[None]) for row in raw["pixel_values_videos"]]),
        }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    times: dict[str, float] = {}
    losses: dict[str, float] = {}
    for name, inputs in (("raw", raw), ("cached", features)):
        taken = []
        for _ in range(steps + 1):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            out = model(input_ids=text.to(device), **inputs, return_loss=True)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses[name] = out.loss.item()
            taken.append(time.perf_counter() - started)
        times[name] = float(np.median(taken[1:]))
    return {
        "preset": preset, "device": device, "raw_seconds": times["raw"], "cached_seconds": times["cached"],
        "times_faster": times["raw"] / times["cached"], "loss": losses,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["throughput", "padding", "memory"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4)
    given = parser.parse_args()
    runs = {
        "throughput": lambda: throughput(given.clips, given.workers, given.rounds),
        "padding": padding,
        "memory": lambda: memory(given.samples, given.workers),
        "wait": lambda: wait(given.steps, given.workers),
        "cache": lambda: cache(given.preset, given.device, given.batch, given.steps),
    }
    for name in given.what:
        print(json.dumps({name: runs[name]()}), flush=True)


if __name__ == "__main__":
    main()
