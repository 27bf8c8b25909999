"""What a run starts with: its model and tokenizer, and its data."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..checkpoint import build_model, load_model
from ..config import ConfigError, TrainConfig
from ..conversion.warm_start import warm_start
from ..data.cache import reader_for
from ..data.dataset import ClipReader, Collate, load_into_memory
from ..data.loader import BatchSampler, Loader
from ..data.manifest import Manifest, read_manifest
from ..data.processor import Processor
from ..data.tokenizer import read_tokenizer, train_tokenizer
from ..model.codec import CodecEncoder
from ..model.peav import PEAudioVideo
from ..ranks import rank, world_size

CALIBRATION_CLIPS = 12  # of which a random codec hears the first second


def prepare_model(
    config: TrainConfig, clips: Manifest, device: torch.device, console: Console
) -> tuple[PEAudioVideo, Processor]:
    """From the checkpoint, or with random weights, warm starts, and a tokenizer made from the captions."""
    if config.checkpoint is not None:
        model = load_model(config.checkpoint, device)
        if not isinstance(model, PEAudioVideo):
            raise ConfigError(f"{config.checkpoint} is a PEAudioFrame: python -m pe_av.training.frame trains it")
        return model.float().train(), Processor.from_pretrained(config.checkpoint)
    model = build_model(config.model, device).train()
    for line in warm_start(model, config.init):
        console.print(line, soft_wrap=True)
    if config.init.text is not None:
        tokenizer = read_tokenizer(config.init.text)
    else:
        tokenizer = train_tokenizer(clips.texts(), config.model.text.vocab_size)
    processor = Processor(config.model, tokenizer)
    if not config.model.audio.codec.trainable and config.init.codec is None:
        items = map(ClipReader(processor, config.data.max_seconds), clips)
        waveforms = (item["waveform"] for item in items if "waveform" in item)
        calibrate(model.audio.codec, waveforms, config.model.audio.codec.sampling_rate, device)
    return model, processor


def calibrate(codec: CodecEncoder, waveforms: Iterable[Tensor], rate: int, device: torch.device) -> None:
    """A random codec stays as it starts, so it starts with its channels scaled to the sounds that there are.

    Args:
        waveforms: (samples,) each, of which the first that last a second are heard.
        rate: samples per second.
    """
    second = rate // codec.hop_length * codec.hop_length
    heard = list(islice((w[:second] for w in waveforms if len(w) >= second), CALIBRATION_CLIPS))
    if heard:
        codec.calibrate(torch.stack(heard)[:, None].to(device))


def prepare_loaders(
    config: TrainConfig,
    model: PEAudioVideo,
    processor: Processor,
    device: torch.device,
    train_clips: Manifest,
    eval_clips: Manifest,
) -> tuple[Loader, Loader]:
    """The training and the evaluation clips in batches for this device."""
    data = config.data

    def codec_features(waveform: Tensor) -> Tensor:
        return model.audio.encode(waveform.to(device))[0].cpu()

    kinds = tuple(dict.fromkeys(pairing.caption for pairing in config.loss.pairings if pairing.weight))
    ranks = {"rank": rank(), "world": world_size()}
    train = BatchSampler(
        len(train_clips),
        config.batch_size,
        shuffle=True,
        seed=config.seed,
        lengths=train_clips.lengths(data.max_seconds),
        parts=train_clips.parts(),
        max_tokens=data.batch_tokens,
        **ranks,
    )
    evaluation = BatchSampler(len(eval_clips), config.eval_batch_size, **ranks)
    loaders = []
    for title, clips, sampler in (("training", train_clips, train), ("evaluation", eval_clips, evaluation)):
        read: Callable[[Any], dict[str, Any]] = reader_for(data, model, processor)
        items: Sequence[Any] = clips
        workers = data.num_workers
        if data.in_memory:
            encode = None if model.config.audio.codec.trainable else codec_features
            title = f"reading the {title} clips"
            items = load_into_memory(clips, read, workers, encode, title, data.time_limit)
            read, workers = dict, 0
        # held-out clips also have one caption for all, by which they are found
        collate = Collate(processor, kinds if sampler is train else tuple(dict.fromkeys((None, *kinds))))
        loaders.append(Loader(items, read, sampler, collate, workers, data.time_limit, device.type == "cuda"))
    return loaders[0], loaders[1]


def watch_loader(config: TrainConfig, processor: Processor) -> Loader | None:
    """Of the clips that `watch` names."""
    if config.watch is None:
        return None
    clips = read_manifest(config.watch)
    reader = ClipReader(processor, config.data.max_seconds)
    sampler = BatchSampler(len(clips), config.eval_batch_size, rank=rank(), world=world_size())
    return Loader(clips, reader, sampler, Collate(processor), config.data.num_workers, config.data.time_limit)
