"""The report of an evaluation: `report.html`, one page that needs no network and no other file, and `report.md`, the
same tables as text. The page is laid out by report.html.jinja."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from matplotlib.image import imsave
from torch import Tensor

from pe_av.config import PAIRINGS, EvalConfig
from pe_av.data.manifest import Manifest
from pe_av.evaluation.embedder import EmbeddedClips
from pe_av.evaluation.examples import (
    BINS,
    FRAME_HEIGHT,
    HALF,
    clips_of_rows,
    data_uri,
    pick_examples,
    picture_of,
    playable,
    shown_rows,
)
from pe_av.evaluation.metrics import DIRECTIONS, Ranked
from pe_av.evaluation.report import TITLES

PAGE_BYTES = 20_000_000  # films and sounds that would make a page larger are left out
CAPTION_LENGTH = 300  # characters of a caption that are shown
SHOWN = 64  # clips of a heat map, as in similarity.png
FIGURES = {"R@1": 1, "R@5": 1, "R@10": 1, "mAP@10": 1, "MedR": 0, "MeanR": 1, "MRR": 3}  # name -> decimals


@dataclass
class Evaluation:
    """Everything that a report tells of one evaluation."""

    config: EvalConfig
    metrics: Mapping[str, Mapping[str, Any]]  # direction -> `retrieval_metrics`
    reweighted: Mapping[str, Mapping[str, Any]]  # the same by the original's protocol; may be empty
    ranked: Mapping[str, Ranked]
    embedded: EmbeddedClips
    manifest: Manifest
    setting: Mapping[str, Any]  # what changes a score, for the record

    @property
    def data(self) -> str:
        """What the data set is called."""
        data = self.config.data
        named = {"stamps": data.stamps, "demo world": data.demo}  # in the order in which `open_manifest` looks
        name = data.corpus or next((name for name, given in named.items() if given is not None), None)
        return name or " ".join(filter(None, (data.eval, data.eval_split)))

    @property
    def cosine(self) -> bool:
        return self.config.protocol == "cosine"


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write `report.html` and `report.md` to `folder`. The page has at most about `PAGE_BYTES`."""
    (folder / "report.md").write_text(markdown(evaluation), encoding="utf-8")
    (folder / "report.html").write_text(html(evaluation), encoding="utf-8")


def html(evaluation: Evaluation, page_bytes: int = PAGE_BYTES) -> str:
    """The page. Films and sounds are embedded as long as it stays below `page_bytes`, in the order in which their clips
    appear; the rest is counted in the page."""
    embedded = evaluation.embedded
    examples = {
        direction: pick_examples(direction, ranked, embedded, evaluation.cosine)
        for direction, ranked in evaluation.ranked.items()
    }
    clips = clips_of_rows(embedded, evaluation.manifest, shown_rows(examples))
    pictures = {row: picture_of(clip, evaluation.config.data.max_seconds) for row, clip in clips.items()}
    captions = {row: _first_caption(embedded, row) for row in clips}
    bound, maps = heat_maps(embedded.embeds, embedded.valid)

    def rendered(media: dict[int, list[str]], left_out: dict[str, int]) -> str:
        return template_of(Path(__file__).with_name("report.html.jinja")).render(
            evaluation=evaluation,
            table=table(evaluation),
            curves=curves(evaluation.ranked),
            bound=bound,
            maps=maps,
            scale=_png(np.linspace(-1, 1, 128)[None], 1.0),
            examples=examples,
            clips=clips,
            pictures=pictures,
            captions=captions,
            media=media,
            left_out=left_out,
            published=published_table(evaluation),
            size={"bins": BINS, "height": 2 * HALF, "frame_height": FRAME_HEIGHT},
        )

    # an empty list for every clip, and two dozen bytes for each reason: the page with all its text
    left = page_bytes - len(rendered(dict.fromkeys(clips, []), {}).encode()) - 2000
    media: dict[int, list[str]] = {}
    left_out: dict[str, int] = {}
    for row, clip in clips.items():
        files, reason = playable(clip)
        cost = sum(4 * math.ceil(path.stat().st_size / 3) + 64 for _, path in files)
        if files and not pictures[row]:
            files, reason = [], "damaged"
        elif files and cost > left:
            files, reason = [], f"beyond the {page_bytes / 1e6:g} MB of this page"
        if files:
            left -= cost
            media[row] = [data_uri(kind, path.read_bytes()) for kind, path in files]
        elif reason is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
    return rendered(media, left_out)


@lru_cache
def template_of(path: Path) -> jinja2.Template:
    """The template of a page, with the filters that pages share."""
    environment = jinja2.Environment(
        autoescape=True,  # captions and ids are whatever the user's files say
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shortened": shortened, "log10": math.log10}
    environment.filters["signed"] = lambda value: f"{value:z.2f}".replace("-", "−")
    return environment.from_string(path.read_text(encoding="utf-8"))


def shortened(text: str) -> str:
    return text if len(text) <= CAPTION_LENGTH else text[:CAPTION_LENGTH].rstrip() + " …"


def _first_caption(embedded: EmbeddedClips, row: int) -> str | None:
    numbers = embedded.captions[row]
    return embedded.sentences[int(numbers[0])] if len(numbers) and numbers[0] >= 0 else None


def table(evaluation: Evaluation) -> dict[str, Any]:
    """{"columns": names, "rows": [(direction, cells)]}; a cell is (value, interval or None), both as text."""
    columns = ["R@1", *(["R@1 re-weighted"] if evaluation.reweighted else []), "chance", *list(FIGURES)[1:]]
    rows = []
    for direction in DIRECTIONS:
        if direction not in evaluation.metrics:
            continue
        row = evaluation.metrics[direction]
        cells = []
        for name in columns:
            source, key = (evaluation.reweighted.get(direction, {}), "R@1") if "re-weighted" in name else (row, name)
            cells.append(("–", None) if key not in source else _cell(source, key))
        rows.append((direction, [*cells, (str(row["queries"]), None), (str(row["gallery"]), None)]))
    return {"columns": [*columns, "queries", "gallery"], "rows": rows}


def _cell(row: Mapping[str, Any], name: str) -> tuple[str, str | None]:
    if name == "chance":
        return f"{row[name]:.2g}", None
    decimals = FIGURES[name]
    value = f"{row[name]:g}" if name == "MedR" else f"{row[name]:.{decimals}f}"
    interval = row.get("ci95", {}).get(name)
    return value, interval and " – ".join(f"{bound:.{decimals}f}" for bound in interval)


def curves(ranked: Mapping[str, Ranked]) -> list[dict[str, Any]]:
    """For each pairing with ranks: its title, the size of the larger gallery, and for each of its directions the points
    (k, R@k in percent) at which the curve is drawn."""
    panels = []
    for pairing, sides in PAIRINGS.items():
        lines = {}
        for direction, names in DIRECTIONS.items():
            if set(names) == set(sides) and direction in ranked:
                ranks, gallery = ranked[direction].ranks, len(ranked[direction].items)
                ks = sorted({round(k) for k in np.geomspace(1, gallery, 48)} | {1, min(5, gallery), min(10, gallery)})
                below = torch.bincount(ranks, minlength=gallery + 1).cumsum(0)
                lines[direction] = [(k, 100 * below[k].item() / len(ranks)) for k in ks]
        if lines:
            largest = max(points[-1][0] for points in lines.values())
            panels.append({"title": TITLES[pairing], "gallery": largest, "lines": lines})
    return panels


def heat_maps(embeds: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> tuple[float, list[dict[str, Any]]]:
    """The cosine similarities of the first `SHOWN` clips in each pairing.

    Returns:
        the cosine of the strongest colour, and for each pairing its title, sides, picture as a data URI, and the mean
        cosine of matched and of other pairs (None if there is one clip).
    """
    cosines = {}
    for pairing, sides in PAIRINGS.items():
        if all(name in embeds for name in sides):
            rows = (valid[sides[0]] & valid[sides[1]]).nonzero().flatten()[:SHOWN]
            if len(rows):
                left, right = (F.normalize(embeds[name][rows].double(), dim=1) for name in sides)
                cosines[pairing] = (left @ right.T).numpy()
    bound = max((float(np.abs(cosine).max()) for cosine in cosines.values()), default=1.0)
    maps = []
    for pairing, cosine in cosines.items():
        others = cosine[~np.eye(len(cosine), dtype=bool)]
        maps.append(
            {
                "title": TITLES[pairing],
                "picture": _png(cosine, bound),
                "clips": len(cosine),
                "matched": float(cosine.diagonal().mean()),
                "others": float(others.mean()) if len(others) else None,
            }
        )
    return bound, maps


def _png(values: np.ndarray, bound: float) -> str:
    """One pixel per value, from -bound to bound; the page enlarges it."""
    file = io.BytesIO()
    imsave(file, values, cmap="RdBu_r", vmin=-bound, vmax=bound, format="png")
    return data_uri("image/png", file.getvalue())


@lru_cache(1)
def published() -> dict[str, Any]:
    """The figures of published.yaml."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def published_table(evaluation: Evaluation) -> dict[str, Any]:
    """The published R@1 on the evaluation's corpus, or on all corpora if it has none there, with the evaluation's own
    rows below.

    Returns:
        {"columns": [(corpus, direction)], "rows": [(model, protocol, cells as text)], "own": number of the evaluation's
        rows at the end, "source"}.
    """
    columns, rows = published()["retrieval"]["columns"], published()["retrieval"]["rows"]
    chosen = [i for i, column in enumerate(columns) if column["corpus"] == evaluation.config.data.corpus]
    own: list[tuple[str, str, list[str]]] = []
    if chosen:
        plain = "cosine" if evaluation.cosine else "dot product"
        for protocol, metrics in (("re-weighted", evaluation.reweighted), (plain, evaluation.metrics)):
            found = [metrics.get(columns[i]["direction"], {}).get("R@1") for i in chosen]
            if metrics:
                own.append(
                    (
                        evaluation.config.checkpoint,
                        protocol,
                        ["–" if value is None else f"{value:.1f}" for value in found],
                    )
                )
    shown = chosen or range(len(columns))
    published_rows = [(model, "re-weighted", [f"{values[i]:.1f}" for i in shown]) for model, values in rows.items()]
    headings = [(columns[i]["corpus"], columns[i]["direction"].replace("->", " → ")) for i in shown]
    return {
        "columns": headings,
        "rows": published_rows + own,
        "own": len(own),
        "source": published()["source"],
    }


def markdown(evaluation: Evaluation) -> str:
    """The tables of the report, for a paper or an issue."""
    figures = table(evaluation)
    lines = [f"# Zero-shot retrieval: {_plain(evaluation.config.checkpoint)} on {_plain(evaluation.data)}", ""]
    cells = [
        [direction.replace("->", " → ")] + [f"{v} [{i}]" if i else v for v, i in row]
        for direction, row in figures["rows"]
    ]
    lines += markdown_table(["direction", *figures["columns"]], cells)
    lines += ["", "Recalls, chance and mAP in percent; in brackets 95 % bootstrap intervals.", ""]
    lines += [f"R@1 in percent beside published figures ({published()['source']}):", ""]
    beside = published_table(evaluation)
    lines += markdown_table(
        ["model", "protocol", *map(" ".join, beside["columns"])],
        [[model, protocol, *row] for model, protocol, row in beside["rows"]],
    )
    setting = [(name, "–" if value is None else value) for name, value in evaluation.setting.items()]
    lines += ["", "Setting:", "", *markdown_table(["setting", "value"], setting)]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table whose first column is text and whose others are numbers."""
    lines = [[*columns], ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return ["| " + " | ".join(_plain(str(cell)) for cell in row) + " |" for row in lines]


def _plain(text: str) -> str:
    """Text that is nothing but text in a cell of Markdown; underscores and brackets inside words are that already."""
    for character in "\\|<>*`":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
