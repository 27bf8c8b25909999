"""The embeddings of a corpus, written in parts: `python -m pe_av.embed checkpoint=DIR source=FOLDER target=DIR`.

`source` is a manifest, a folder, or a pattern of media files or tar shards. The target is a folder as `pe_av.index`
describes it. Ended early, the same command goes on with the parts that are missing. Under torchrun the ranks share the
parts: a part is always computed by one process alone, so that its embeddings do not depend on how many there are.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from pe_av.checkpoint import load_model
from pe_av.config import HEADS, ConfigError, EmbedConfig, PEAudioFrameConfig
from pe_av.config.compose import read_model_config, run_command
from pe_av.data.cache import reader_for
from pe_av.data.clips import open_manifest
from pe_av.data.files import find_clips
from pe_av.data.manifest import Clip, Manifest, Modality
from pe_av.device import pick_device, precision_context, to_device
from pe_av.evaluation.labelled import TracksReader
from pe_av.evaluation.setting import evaluation_setting
from pe_av.evaluation.windows import windowed
from pe_av.index import RECORD, list_bad, part_count, part_path, read_record, write_part, write_record
from pe_av.loading.bad_items import FEWEST_JUDGED
from pe_av.loading.batch import Collate
from pe_av.loading.loader import Loader
from pe_av.loading.sampler import BatchSampler
from pe_av.loading.split import split_batch
from pe_av.media.processor import Processor
from pe_av.media.tracks import source_path
from pe_av.ranks import of_rank_0, process_group, rank, world_size

SIZES_KEPT = 100  # files whose sizes index.json keeps
# of what index.json records, what may differ when the rest of the parts is computed: it changes nothing but rounding
_MAY_DIFFER = ("device", "pe_av", "torch", "checkpoint", "source")


@dataclass
class Plan:
    """What is to be embedded, how, and where to. It travels to other processes by pickle."""

    config: EmbedConfig
    clips: Sequence[Clip]  # a row each: the clips, or their windows
    names: list[str]  # the embeddings that are kept
    record: dict[str, Any]  # of index.json

    @property
    def folder(self) -> Path:
        return Path(self.config.target)

    def missing(self) -> list[int]:
        """The numbers of the parts that are not finished."""
        return [n for n in range(part_count(self.record)) if not part_path(self.folder, n).exists()]

    def rows(self, part: int) -> range:
        size = self.config.part_rows
        return range(part * size, min((part + 1) * size, len(self.clips)))


def make_plan(config: EmbedConfig, device: torch.device) -> Plan:
    """Look at the clips and at what the target already holds; rank 0 writes index.json if there is none.

    Raises:
        ConfigError: there is nothing to embed, the model lacks an embedding that is asked for, or the target holds the
            embeddings of other clips, of another checkpoint or with other settings.
    """
    if not Path(config.checkpoint).is_dir():
        raise ConfigError(f"checkpoint={config.checkpoint}: no such folder; give one such as runs/<date>/checkpoint")
    model = read_model_config(Path(config.checkpoint) / "config.yaml")
    if isinstance(model, PEAudioFrameConfig):
        raise ConfigError(f"{config.checkpoint} is a PEAudioFrame, which has no embedding of a whole clip")
    for name in config.embeddings or ():
        if name not in model.heads:
            raise ConfigError(f"{config.checkpoint}: has no embedding {name}, only {', '.join(model.heads)}")
    if config.source is None and config.data.demo is None and config.data.stamps is None and config.data.eval is None:
        raise ConfigError("source is not set: give a manifest, a folder, or a pattern such as source='clips/**/*.mp4'")
    clips = open_manifest(config.data, "eval") if config.source is None else find_clips(config.source)
    windows = clips if config.windows.seconds is None else windowed(clips, config.windows)
    has = np.bitwise_or.reduce(clips.modalities())
    inputs = {one.name.lower() for one in Modality if one & has} | {"fusion"}
    if not (Path(config.checkpoint) / "tokenizer.json").exists():
        inputs.discard("text")
    possible = [name for name in model.heads if set(HEADS[name]) <= inputs]
    for name in config.embeddings or ():
        if name not in possible:
            lacking = ", ".join(sorted(set(HEADS[name]) - inputs))
            raise ConfigError(
                f"embeddings={name}: the clips have no {lacking}, or the checkpoint has no tokenizer for it"
            )
    names = config.embeddings or possible
    record = {
        "rows": len(windows),
        "part_rows": config.part_rows,
        "embeddings": dict.fromkeys(names, model.output_dim),
        **evaluation_setting(config, model, clips, device),
        "checkpoint": str(Path(config.checkpoint).resolve()),
        "source": config.source or config.data.eval,
    }
    folder = Path(config.target)
    known, sizes = of_rank_0((read_record(folder), _sizes(clips)) if rank() == 0 else None)
    for name, value in record.items() if known is not None else ():
        if name not in _MAY_DIFFER and known.get(name) != value:
            raise ConfigError(
                f"{folder / RECORD}: the embeddings there have {name}={known.get(name)}, now it is {value}; go on with "
                "the settings, the checkpoint and the clips that it was begun with, or give another target"
            )
    for name, size in sizes.items() if known is not None else ():
        before = known.get("sizes", {}).get(name)
        if None not in (size, before) and size != before:
            raise ConfigError(
                f"{folder / RECORD}: {name} had {before:,} bytes when it was begun, and now has {size:,}: go on "
                "with the same files, or give another target"
            )
    if known is None and rank() == 0:
        write_record(folder, {**record, "sizes": sizes})
    return Plan(config, windows, names, record)


def _sizes(clips: Manifest) -> dict[str, int | None]:
    """The bytes of some clips' files, evenly spread from the first to the last, to tell files of the same name apart;
    None for those that are not there."""
    found: dict[str, int | None] = {}
    for row in np.unique(np.linspace(0, len(clips) - 1, SIZES_KEPT).astype(int)).tolist():
        file = source_path(clips[row].video or clips[row].audio or "")
        found[clips[row].id] = os.path.getsize(file) if os.path.isfile(file) else None
    return found


@dataclass
class Throughput:
    """How fast it was, and what would limit it if the rest cost nothing."""

    rows: int = 0
    bad: int = 0  # rows of which something is damaged
    last_error: str = ""
    seconds: float = 0.0
    model: float = 0.0  # seconds in the model
    reading: float = 0.0  # seconds of all workers together, in reading files

    def line(self, workers: int) -> str:
        rate, model = self.rows / max(self.seconds, 1e-9), self.rows / max(self.model, 1e-9)
        reading = self.rows * max(workers, 1) / max(self.reading, 1e-9)
        return (
            f"{self.rows:,} rows in {self.seconds:,.0f} s: {rate:,.1f} per second (the model alone {model:,.1f}, "
            f"reading alone {reading:,.1f} with {max(workers, 1)} processes)"
        )


class _Timed:
    """Reads a clip and notes how long it took."""

    def __init__(self, read: Callable[[Clip], dict[str, Any]]):
        self.read = read

    def __call__(self, clip: Clip) -> dict[str, Any]:
        start = time.perf_counter()
        return self.read(clip) | {"reading": time.perf_counter() - start}


class PartWriter:
    """A model that writes parts of a plan."""

    def __init__(self, plan: Plan, device: torch.device):
        self.plan, self.device = plan, device
        config = plan.config
        towers = {tower for name in plan.names for tower in HEADS[name]}
        self.model = load_model(config.checkpoint, device, towers=sorted(towers))
        self.processor = Processor.from_pretrained(config.checkpoint, config.data.reader)
        self.collate = Collate(self.processor, (None,) if "text" in towers else (), least=1)
        self.read = reader_for(config.data, self.model, self.processor)
        if config.data.cache is None:
            self.read = TracksReader(self.read, tuple(sorted(towers & {"audio", "video"})))

    def write(self, parts: Sequence[int], shows_progress: bool = True) -> Throughput:
        """Embed the rows of these parts, in ascending order, and write each part when it is complete.

        Raises:
            ConfigError: too many rows are damaged. The parts that are finished stay.
        """
        config, throughput = self.plan.config, Throughput()
        rows = [row for part in parts for row in self.plan.rows(part)]
        loader = Loader(
            _Rows(self.plan.clips, rows),
            _Timed(self.read),
            BatchSampler(len(rows), config.batch_size),  # a part is a multiple of a batch, so no batch is in two parts
            self._collated,
            config.data.num_workers,
            config.data.time_limit,
            pin_memory=self.device.type == "cuda",
        )
        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            "{task.fields[rate]}",
            TimeRemainingColumn(),
        )
        begin = time.perf_counter()
        with Progress(*columns, console=Console(stderr=True, quiet=not shows_progress)) as progress:
            task = progress.add_task("embedding", total=len(rows), rate="")
            try:
                batches = iter(loader)
                for part in parts:
                    for _ in self._write_part(part, batches, throughput):
                        throughput.seconds = time.perf_counter() - begin
                        rate = f"{throughput.rows / throughput.seconds:,.1f}/s"
                        progress.update(task, completed=throughput.rows, rate=rate)
                        self._check(throughput, len(rows))
            finally:
                loader.close()
        return throughput

    def _write_part(self, part: int, batches: Iterator[dict[str, Any]], throughput: Throughput) -> Iterator[None]:
        """Yields after every batch; the part is written after the last."""
        clips = [self.plan.clips[row] for row in self.plan.rows(part)]
        rows = [_row(clip) for clip in clips]
        first = self.plan.rows(part).start
        embeds = {
            name: np.zeros((len(clips), width), np.float32) for name, width in self.plan.record["embeddings"].items()
        }
        valid = {name: np.zeros(len(clips), bool) for name in embeds}
        for start in range(0, len(clips), self.plan.config.batch_size):
            batch = next(batches)
            at = np.array([int(row) - first for row in batch["ids"]], np.int64)
            begin = time.perf_counter()
            for name, values in self.embed(batch).items():
                has = batch["valid"][name].numpy()
                broken = has & ~np.isfinite(values).all(1)
                for place in at[broken]:
                    rows[place]["error"] = f"its {name} embedding is NaN or infinite"
                embeds[name][at[has & ~broken]], valid[name][at[has & ~broken]] = values[has & ~broken], True
            throughput.model += time.perf_counter() - begin
            for note, key in (("bad", "error"), ("partial", "partial"), ("cut", "cut")):
                for item in batch[note]:
                    rows[int(item["id"]) - first][key] = item["seconds"] if note == "cut" else item["error"]
            done = rows[start : start + self.plan.config.batch_size]
            throughput.rows += len(done)
            throughput.bad += sum("error" in row for row in done)
            throughput.reading += batch["reading"]
            throughput.last_error = next((row["error"] for row in done if "error" in row), throughput.last_error)
            yield
        write_part(part_path(self.plan.folder, part), rows, embeds, valid)

    @torch.inference_mode()
    def embed(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """The embeddings that are kept: name -> (B, D) float32."""
        if not batch["ids"]:
            return {}
        (whole,) = split_batch(batch, None)
        whole = to_device(whole, self.device)
        with precision_context(self.plan.config.precision, self.device):
            embeds = self.model.embed(whole["inputs"], whole["texts"], whole["rows"], whole["size"])
        return {name: embeds[name].float().cpu().numpy() for name in self.plan.names if name in embeds}

    def _collated(self, items: list[dict[str, Any]], picks: list[int]) -> dict[str, Any]:
        return self.collate(items, picks) | {"reading": sum(item.get("reading", 0.0) for item in items)}

    def _check(self, throughput: Throughput, total: int) -> None:
        limit = self.plan.config.max_bad_fraction
        if throughput.bad > limit * max(throughput.rows, min(total, FEWEST_JUDGED)):
            raise ConfigError(
                f"{throughput.bad} of {throughput.rows} rows are damaged, more than max_bad_fraction={limit:g} allows; "
                f"the last: {throughput.last_error}; what is finished stays in {self.plan.folder}"
            )


class _Rows(Sequence[Clip]):
    """Some rows of the clips, each made when it is asked for, with the number of its row as its id."""

    def __init__(self, clips: Sequence[Clip], rows: Sequence[int]):
        self.clips, self.rows = clips, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Clip:
        return replace(self.clips[self.rows[index]], id=str(self.rows[index]))


def _row(clip: Clip) -> dict[str, Any]:
    """The columns of a part that the manifest knows."""
    audio, video = (source and os.path.abspath(source) for source in (clip.audio, clip.video))
    captions = [text for texts in clip.captions.values() for text in texts]
    row = {"id": clip.id, "audio": audio, "video": video, "start": clip.start, "end": clip.end, "split": clip.split}
    return row | {"captions": captions or None}


def embed_corpus(config: EmbedConfig, _: Path | None = None) -> None:
    """Embed what is missing in the target, in this process or as one of the ranks that torchrun started.

    Raises:
        ConfigError, CheckpointError: as `make_plan` and `PartWriter.write`.
    """
    with process_group(pick_device(config.device), config.timeout_minutes) as device:
        plan = make_plan(config, device)
        place, parts = rank(), of_rank_0(plan.missing())[rank() :: world_size()]
    # from here on, no rank waits for another
    console = Console(stderr=True)
    try:
        if parts:
            throughput = PartWriter(plan, device).write(parts, shows_progress=place == 0)
            console.print(throughput.line(config.data.num_workers), soft_wrap=True)
    finally:
        list_bad(plan.folder)
    missing = plan.missing()
    state = f"{len(missing)} parts are still missing" if missing else f"{len(plan.clips):,} rows"
    console.print(f"{state}: {plan.folder}", soft_wrap=True)


if __name__ == "__main__":
    run_command(EmbedConfig, "embed", embed_corpus)
