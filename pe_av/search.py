"""Search in a folder of embeddings that `python -m pe_av.embed` has written.

    python -m pe_av.search INDEX "a dog barks"                     clips that show and sound like it
    python -m pe_av.search INDEX "a dog barks" --in audio          clips that sound like it
    python -m pe_av.search INDEX --audio bark.wav                  films that go with a sound
    python -m pe_av.search INDEX --video dog.mp4 --in audio        sounds that go with a film or a picture
    python -m pe_av.search INDEX "at night" --audio bark.wav       films that go with a sound and a text

Queries and rows are compared by the embeddings that were trained to be compared; where none were, such as audio with
audio, by the cosine.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pe_av.checkpoint import load_model
from pe_av.config import HEADS, PAIRINGS, ConfigError
from pe_av.device import pick_device, to_device
from pe_av.evaluation.setting import weights_sha256
from pe_av.index import Index
from pe_av.media.processor import Media, Processor
from pe_av.nearest import nearest, nearest_approximately

# what is searched where `--in` does not say it, the first that the index has
PREFERRED = (
    "audio_video", "video", "audio",
    "text_audio_video", "text_video", "text_audio", "video_plus_text", "audio_plus_text",
)  # fmt: skip
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    "!=": pc.not_equal,
    "=": pc.equal,
    ">": pc.greater,
    "<": pc.less,
    "~": pc.match_substring,
}


@dataclass
class Hit:
    """A row that was found."""

    rank: int
    score: float  # the dot product; the cosine where the embeddings were not trained to be compared
    probability: float | None  # that query and row belong together, as the model sees it; None for a cosine
    id: str
    audio: str | None
    video: str | None
    start: float
    end: float | None
    captions: list[str]


class Searcher:
    """An index and the model that made it."""

    def __init__(self, index: Index, checkpoint: str | Path | None = None, device: str = "auto"):
        """
        Args:
            checkpoint: folder of the model that made the index; None: where it was then.
        Raises:
            ConfigError, CheckpointError: no checkpoint there, or another one than made the index.
        """
        self.index = index
        folder = Path(index.record["checkpoint"] if checkpoint is None else checkpoint)
        if not folder.is_dir():
            raise ConfigError(f"{folder}: the checkpoint that made {index.folder} is not there; give --checkpoint DIR")
        self.device = pick_device(device)
        self.model = load_model(folder, self.device)
        if weights_sha256(folder) != index.record["checkpoint_sha256"]:
            raise ConfigError(
                f"{folder}: not the checkpoint that made {index.folder}, so its embeddings cannot be compared; give "
                "--checkpoint DIR, or embed again with this one"
            )
        self.processor = Processor.from_pretrained(folder)

    def search(
        self,
        text: str | None = None,
        audio: Media | None = None,
        video: Media | None = None,
        within: str | None = None,
        top: int = 10,
        where: Sequence[str] = (),
        approximate: bool = False,
        sampling_rate: int | None = None,
    ) -> list[Hit]:
        """The rows that answer a query of one or two of text, audio and video best.

        Args:
            audio, video: paths, or tensors as `Processor` takes them; `video` may be a picture.
            within: the embedding that is searched, such as "audio"; None: what suits the query, see `PREFERRED`.
            where: conditions on columns of the index, as `allowed_rows` takes them.
        Raises:
            ConfigError: a query or a condition that cannot be used.
            MediaError: a file that cannot be read.
        """
        given = {
            name: value for name, value in (("text", text), ("audio", audio), ("video", video)) if value is not None
        }
        query, target, pairing = how_to_compare(
            list(given), self.index.embeddings, within, list(self.model.config.heads)
        )
        batch = self.processor(text=text, audio=audio, videos=video, sampling_rate=sampling_rate)
        with torch.inference_mode():
            embeds = self.model.embed(to_device(batch, self.device))[query].float().cpu().numpy()
        allowed = allowed_rows(self.index, where) if where else None
        if approximate and pairing is not None:
            scores, rows = nearest_approximately(self.index, target, embeds, top, allowed)
        else:
            scores, rows = nearest(self.index, target, embeds, top, allowed, cosine=pairing is None)
        probabilities: list[float | None] = [None] * len(scores[0])
        if pairing is not None:
            logits = self.model.logits[pairing]
            logit = logits.scale.item() * torch.from_numpy(scores[0]) + logits.bias.item()
            probabilities = logit.sigmoid().tolist()
        about = self.index.rows().take(pa.array(rows[0])).to_pylist()
        return [
            Hit(
                rank=place + 1,
                score=float(scores[0, place]),
                probability=probabilities[place],
                captions=row["captions"] or [],
                **{name: row[name] for name in ("id", "audio", "video", "start", "end")},
            )
            for place, row in enumerate(about)
        ]


def how_to_compare(
    given: Sequence[str], indexed: Sequence[str], within: str | None, heads: Sequence[str]
) -> tuple[str, str, str | None]:
    """Which embedding of a query is compared with which embedding of the index.

    Args:
        given: what the query consists of: one or two of "text", "audio", "video".
        indexed: the embeddings of the index.
        within: the one to search; None: the first of `PREFERRED` that fits, and is trained to be compared if one is.
        heads: the embeddings of the model.
    Returns:
        the embedding of the query, the one of the index, and the pairing that trained them; None: they are of one kind.
    Raises:
        ConfigError: they cannot be compared; the message says what can.
    """
    if not 1 <= len(given) <= 2:
        raise ConfigError(
            f"a query is one or two of text, audio and video, but {' and '.join(given) or 'nothing'} was given"
        )
    queries = [name for name in heads if set(HEADS[name]) - {"fusion"} == set(given)]
    ways = {}  # embedding of the index -> (of the query, pairing)
    for pairing, (left, right) in PAIRINGS.items():
        for query, target in ((left, right), (right, left)):
            if query in queries and target in indexed:
                ways[target] = query, pairing
    for name in queries:
        if name in indexed:
            ways.setdefault(name, (name, None))
    if not ways:
        raise ConfigError(
            f"a query of {' and '.join(given)} cannot be compared with what the index has: {', '.join(indexed)}"
        )
    if within is not None and within not in ways:
        raise ConfigError(
            f"--in {within}: a query of {' and '.join(given)} can be searched in {', '.join(ways)} of this index"
        )
    trained = [name for name, (_, pairing) in ways.items() if pairing is not None]
    target = within or min(trained or ways, key=PREFERRED.index)
    return ways[target][0], target, ways[target][1]


def allowed_rows(index: Index, where: Sequence[str]) -> np.ndarray:
    """(N,) bool, the rows that fulfil all conditions, such as "split=test", "start>=10" and "video~/2024/", where ~
    means that the column contains the text. Rows where a column is null fulfil no condition on it.

    Raises:
        ConfigError: a condition that cannot be read, or no row fulfils them.
    """
    rows = index.rows()
    allowed = np.ones(len(rows), bool)
    columns = [field.name for field in rows.schema if not pa.types.is_nested(field.type)]
    for condition in where:
        match = re.fullmatch(r"(\w+)\s*(>=|<=|!=|=|>|<|~)\s*(.*)", condition, re.DOTALL)
        if match is None or match[1] not in columns:
            raise ConfigError(
                f"--where {condition!r}: write COLUMN=VALUE, with =, !=, <, <=, >, >= or ~ (contains), and one of the "
                f"columns {', '.join(columns)}"
            )
        column, sign, value = rows[match[1]], match[2], match[3]
        try:
            fulfilled = OPERATORS[sign](column, value if sign == "~" else pa.scalar(value).cast(column.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise ConfigError(
                f"--where {condition!r}: {match[1]} is a number, to which this cannot be compared"
            ) from None
        allowed &= pc.fill_null(fulfilled, False).to_numpy(zero_copy_only=False)
    if not allowed.any():
        raise ConfigError(f"--where {' '.join(map(repr, where))}: no row of {index.folder} fulfils this")
    return allowed


def print_hits(hits: Sequence[Hit]) -> None:
    """A table on the standard output."""
    table = Table("", "score", "probability", "seconds", "clip", "caption")
    for hit in hits:
        probability = "" if hit.probability is None else f"{hit.probability:.3f}"
        seconds = (
            ""
            if hit.end is None and not hit.start
            else f"{hit.start:.1f}–{'' if hit.end is None else f'{hit.end:.1f}'}"
        )
        caption = next(iter(hit.captions), "")
        table.add_row(str(hit.rank), f"{hit.score:.2f}", probability, seconds, Text(hit.id), Text(caption))
    Console().print(table)


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m pe_av.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("index", help="folder that python -m pe_av.embed has written")
    arguments.add_argument("text", nargs="?", help="what is looked for, in words")
    arguments.add_argument("--audio", help="a file with the sound that is looked for")
    arguments.add_argument("--video", help="a film or a picture that is looked for")
    arguments.add_argument("--in", dest="within", metavar="EMBEDDING", help="such as audio, video or audio_video")
    arguments.add_argument("--top", type=int, default=10, help="how many rows are shown")
    arguments.add_argument("--where", action="append", default=[], metavar="CONDITION", help="such as split=test")
    arguments.add_argument("--approximate", action="store_true", help="by what python -m pe_av.nearest has made")
    arguments.add_argument("--checkpoint", help="where the model is now that made the index")
    arguments.add_argument("--device", default="auto")
    arguments.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments.add_argument("--html", metavar="FILE", help="also write a page with pictures and players")
    return arguments


def main() -> None:
    """The command line."""
    options = parser().parse_args()
    given = {name: getattr(options, name) for name in ("text", "audio", "video")}
    try:
        if options.top < 1:
            raise ConfigError(f"--top {options.top} is not positive")
        if options.html and not Path(options.html).absolute().parent.is_dir():
            raise ConfigError(f"--html {options.html}: its folder does not exist; create it first")
        index = Index(options.index)
        names = [name for name, value in given.items() if value is not None]
        how_to_compare(names, index.embeddings, options.within, list(HEADS))  # before the model is loaded
        if index.missing:
            print(f"note: {index.missing} parts of {index.folder} are not finished and not searched", file=sys.stderr)
        searcher = Searcher(index, options.checkpoint, options.device)
        hits = searcher.search(
            **given, within=options.within, top=options.top, where=options.where, approximate=options.approximate
        )
        if options.html:
            from pe_av.search_page import page_of  # imports what reads pictures

            Path(options.html).write_text(page_of(hits, given), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=1, ensure_ascii=False))
    else:
        print_hits(hits)


if __name__ == "__main__":
    main()
