"""What a training starts with: its model, its tokenizer, and its clips in loaders."""

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

SAMPLES = 1000  # of a stream of shards: the first ones stand for all when its tokenizer and pairings are made
CALIBRATION_CLIPS = 12  # clips on whose first second a random codec is calibrated


def training_clips(data: DataConfig) -> Manifest | MixedManifest:
    """The clips to train on; of a stream of shards, the first `SAMPLES`.

    Raises:
        ConfigError: no data are set, or they cannot be read.
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
    """The model and processor of `checkpoint`; or a new model, with the towers of `init`, and a tokenizer for it.

    Args:
        clips: to train on; a new tokenizer is trained on their captions, and a random codec calibrated on their audio.
        tokenizer: of the run that is resumed; None: the run is new.
    Raises:
        ConfigError: the checkpoint is no PEAudioVideo, or cannot be read.
    """
    model = start_model(config, device)
    if not isinstance(model, PEAudioVideo):
        raise ConfigError(f"{config.checkpoint} is a PEAudioFrame: python -m pe_av.training.frame trains it")
    if config.checkpoint is not None:
        return model, Processor.from_pretrained(config.checkpoint, config.data.reader)
    if config.lora.rank or config.optim.freeze:
        console.print("note: without checkpoint= what is frozen keeps its random weights, or those of init.*")
    if rank() == 0:
        for line in warm_start(model, config.init):
            console.print(line, soft_wrap=True)
    if tokenizer is not None:
        words = Tokenizer.from_str(tokenizer)
    elif config.init.text is not None:
        words = read_tokenizer(config.init.text)
    else:
        words = tokenizer_of_rank_0(clips.texts, config.model.text.vocab_size)
    processor = Processor(config.model, words, config.data.reader)
    if rank() == 0 and not config.model.audio.codec.trainable and config.init.codec is None:
        read: Callable[[Any], dict[str, Any]] = ClipReader(processor, config.data.max_seconds)
        items = map(read, clips)
        if config.data.shards is not None:
            items = map(SampleReader(read), first_samples(config.data.shards, SAMPLES))
        waveforms = (item["waveform"] for item in items if "waveform" in item)
        calibrate(model.audio.codec, waveforms, config.model.audio.codec.sampling_rate, device)
    return model, processor


def start_model(config: RunConfig, device: torch.device) -> Model:
    """The model of `checkpoint`, or a new one with random weights.

    `parallel.parallelize` later gives rank 0's weights to all ranks; with FSDP the others have none until then, so that
    they need no memory for a whole model.
    """
    place = "meta" if rank() and config.parallel.strategy == "fsdp" else device
    if config.checkpoint is None:
        return build_model(config.model, place).train()
    if place == "meta":
        return build_model(read_model_config(Path(config.checkpoint) / CONFIG_FILE), place).train()
    return load_model(config.checkpoint, place).float().train()


def tokenizer_of_rank_0(texts: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """A tokenizer trained on the texts, of which there may be millions: only rank 0 reads them."""
    return Tokenizer.from_str(of_rank_0(train_tokenizer(texts(), vocab_size).to_str() if rank() == 0 else None))


def calibrate(codec: CodecEncoder, waveforms: Iterable[Tensor], rate: int, device: torch.device) -> None:
    """Scale the channels of a random codec so that they have comparable sizes on the given audio.

    A random codec is frozen like any other, so training will not correct its scales.

    Args:
        waveforms: (samples,) each. The first second of the first twelve that last a second is used.
        rate: samples per second.
    """
    second = rate // codec.hop_length * codec.hop_length
    seconds = list(islice((w[:second] for w in waveforms if len(w) >= second), CALIBRATION_CLIPS))
    if seconds:
        codec.calibrate(torch.stack(seconds)[:, None].to(device))


def frozen_codec(model: Model, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """The codec as a function (1, 1, samples) -> (1, positions, D), whose results can be kept, since it is frozen; None
    if it is trained. To be called on all ranks."""
    share_weights(model.audio.codec, device)
    if model.config.audio.codec.trainable:
        return None
    return lambda waveform: model.audio.encode(waveform.to(device))[0].cpu()


def prepare_loaders(
    config: TrainConfig,
    model: PEAudioVideo,
    processor: Processor,
    device: torch.device,
    train_clips: Manifest | MixedManifest,
    eval_clips: Manifest,
) -> tuple[Loader | StreamLoader, Loader]:
    """Loaders of the training and the evaluation clips, giving this rank's rows of every batch."""
    data, pinned = config.data, device.type == "cuda"
    ranks = {"rank": rank(), "world": world_size()}
    kinds = tuple(dict.fromkeys(pairing.caption for pairing in config.loss.pairings))
    # retrieval on held-out clips also needs the caption of everything, whatever the loss compares
    collate, collate_eval = Collate(processor, kinds), Collate(processor, tuple(dict.fromkeys((None, *kinds))))
    read: Callable[[Any], dict[str, Any]] = reader_for(data, model, processor)

    def loader(title: str, clips: Sequence[Any], sampler: BatchSampler, collate: Collate, crop: float | None) -> Loader:
        if not data.in_memory:
            return Loader(clips, read, sampler, collate, data.num_workers, data.time_limit, pinned, crop)
        encode = frozen_codec(model, device)
        items = load_into_memory(clips, read, data.num_workers, encode, f"reading the {title} clips", data.time_limit)
        return Loader(items, dict, sampler, collate, pin_memory=pinned)

    eval_sampler = BatchSampler(len(eval_clips), config.eval_batch_size, **ranks)
    eval_loader = loader("evaluation", eval_clips, eval_sampler, collate_eval, None)
    if data.shards is not None:
        stream = StreamLoader(
            data.shards,
            read,
            collate,
            len(range(rank(), config.batch_size, world_size())),  # this rank's rows of a batch
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
    """A loader of the clips of `watch`, if it is set."""
    if config.watch is None:
        return None
    clips = read_manifest(config.watch)
    reader = ClipReader(processor, config.data.max_seconds)
    sampler = BatchSampler(len(clips), config.eval_batch_size, rank=rank(), world=world_size())
    return Loader(clips, reader, sampler, Collate(processor), config.data.num_workers, config.data.time_limit)
