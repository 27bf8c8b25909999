"""What a run starts with: its model and tokenizer, and its data."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from pe_av.checkpoint import CONFIG_FILE, Model, build_model, load_model
from pe_av.config import ConfigError, DataConfig, RunConfig, TrainConfig
from pe_av.config.compose import read_model_config
from pe_av.conversion.warm_start import warm_start
from pe_av.data.cache import reader_for
from pe_av.data.clips import ClipReader, open_manifest
from pe_av.data.manifest import Manifest, read_manifest
from pe_av.data.mix import MixedManifest, read_mix
from pe_av.data.remote import SampleReader, first_samples
from pe_av.loading.batch import Collate
from pe_av.loading.loader import Loader, load_into_memory
from pe_av.loading.sampler import BatchSampler
from pe_av.loading.stream import StreamLoader
from pe_av.media.processor import Processor
from pe_av.media.tokenizer import read_tokenizer, train_tokenizer
from pe_av.model.codec import CodecEncoder
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.ranks import of_rank_0, rank, world_size
from pe_av.training.parallel import share_weights

SAMPLES = 1000  # of a stream of shards, from which its tokenizer is trained
CALIBRATION_CLIPS = 12  # of which a random codec hears the first second


def training_clips(data: DataConfig) -> Manifest | MixedManifest:
    """What there is to train on; of a stream of shards the first samples, which stand for all.

    Raises:
        ConfigError: no such data.
    """
    if data.mix:
        return read_mix(data.mix)
    if data.shards is not None:
        return Manifest.of([sample.clip for sample in first_samples(data.shards, SAMPLES)])
    return open_manifest(data, "train")


def prepare_model(
    config: TrainConfig,
    clips: Manifest | MixedManifest,
    device: torch.device,
    console: Console,
    tokenizer: str | None,
) -> tuple[PEAudioVideo, Processor]:
    """From the checkpoint, or with random weights, warm starts, and a tokenizer made from the captions.

    Args:
        tokenizer: of the run that goes on, which keeps it; None: of a new one.
    """
    model = start_model(config, device)
    if not isinstance(model, PEAudioVideo):
        raise ConfigError(f"{config.checkpoint} is a PEAudioFrame: python -m pe_av.training.frame trains it")
    if config.checkpoint is not None:
        return model, Processor.from_pretrained(config.checkpoint)
    if rank() == 0:
        for line in warm_start(model, config.init):
            console.print(line, soft_wrap=True)
    if tokenizer is not None:
        words = Tokenizer.from_str(tokenizer)
    elif config.init.text is not None:
        words = read_tokenizer(config.init.text)
    else:
        words = tokenizer_of_rank_0(clips.texts, config.model.text.vocab_size)
    processor = Processor(config.model, words)
    if rank() == 0 and not config.model.audio.codec.trainable and config.init.codec is None:
        read: Callable[[Any], dict[str, Any]] = ClipReader(processor, config.data.max_seconds)
        items = map(read, clips)
        if config.data.shards is not None:
            items = map(SampleReader(read), first_samples(config.data.shards, SAMPLES))
        waveforms = (item["waveform"] for item in items if "waveform" in item)
        calibrate(model.audio.codec, waveforms, config.model.audio.codec.sampling_rate, device)
    return model, processor


def start_model(config: RunConfig, device: torch.device) -> Model:
    """The model of `checkpoint`, or a new one. The weights that count are rank 0's, which `parallel.parallelize` gives
    to the others; under FSDP these have no memory for them until then."""
    place = "meta" if rank() and config.parallel.strategy == "fsdp" else device
    if config.checkpoint is None:
        return build_model(config.model, place).train()
    if place == "meta":
        return build_model(read_model_config(Path(config.checkpoint) / CONFIG_FILE), place).train()
    return load_model(config.checkpoint, place).float().train()


def tokenizer_of_rank_0(texts: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """A tokenizer made from the texts; reading millions of them is the work of one rank."""
    return Tokenizer.from_str(of_rank_0(train_tokenizer(texts(), vocab_size).to_str() if rank() == 0 else None))


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
    train_clips: Manifest | MixedManifest,
    eval_clips: Manifest,
) -> tuple[Loader | StreamLoader, Loader]:
    """The training and the evaluation clips in batches for this rank and device."""
    data, pinned = config.data, device.type == "cuda"
    ranks = {"rank": rank(), "world": world_size()}
    kinds = tuple(dict.fromkeys(pairing.caption for pairing in config.loss.pairings))
    # held-out clips also have one caption for all, by which they are found
    collate, collate_all = Collate(processor, kinds), Collate(processor, tuple(dict.fromkeys((None, *kinds))))
    read: Callable[[Any], dict[str, Any]] = reader_for(data, model, processor)

    def loader(
        title: str, clips: Sequence[Any], sampler: BatchSampler, together: Collate, crop: float | None
    ) -> Loader:
        if not data.in_memory:
            return Loader(clips, read, sampler, together, data.num_workers, data.time_limit, pinned, crop)

        def codec_features(waveform: Tensor) -> Tensor:
            return model.audio.encode(waveform.to(device))[0].cpu()

        encode = None if model.config.audio.codec.trainable else codec_features
        share_weights(model.audio.codec, device)
        items = load_into_memory(clips, read, data.num_workers, encode, f"reading the {title} clips", data.time_limit)
        return Loader(items, dict, sampler, together, pin_memory=pinned)

    evaluation = BatchSampler(len(eval_clips), config.eval_batch_size, **ranks)
    eval_loader = loader("evaluation", eval_clips, evaluation, collate_all, None)
    if data.shards is not None:
        rows = len(range(rank(), config.batch_size, world_size()))  # of this rank
        stream = StreamLoader(
            data.shards,
            read,
            collate,
            rows,
            seed=config.seed,
            num_workers=data.num_workers,
            time_limit=data.time_limit,
            shuffle_window=data.shuffle_window,
            pin_memory=pinned,
            **ranks,
        )
        return stream, eval_loader
    sampler = BatchSampler(
        len(train_clips),
        config.batch_size,
        shuffle=True,
        seed=config.seed,
        lengths=train_clips.lengths(data.max_seconds),
        modalities=train_clips.modalities(),
        max_tokens=data.batch_tokens,
        mixture=train_clips.mixture if isinstance(train_clips, MixedManifest) else None,
        **ranks,
    )
    crop = data.max_seconds if data.random_crop else None
    return loader("training", train_clips, sampler, collate, crop), eval_loader


def watch_loader(config: TrainConfig, processor: Processor) -> Loader | None:
    """Of the clips that `watch` names."""
    if config.watch is None:
        return None
    clips = read_manifest(config.watch)
    reader = ClipReader(processor, config.data.max_seconds)
    sampler = BatchSampler(len(clips), config.eval_batch_size, rank=rank(), world=world_size())
    return Loader(clips, reader, sampler, Collate(processor), config.data.num_workers, config.data.time_limit)
