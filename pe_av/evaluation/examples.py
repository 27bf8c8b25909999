"""What a report shows of single clips: the queries that were answered best and worst, what they found, and pictures,
waveforms and playable files of the clips concerned."""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as VF
from torch import Tensor
from torchvision.io import encode_jpeg

from pe_av.data.manifest import Clip, Manifest
from pe_av.evaluation.embedder import EmbeddedClips
from pe_av.evaluation.metrics import DIRECTIONS, Ranked, windows_of
from pe_av.evaluation.ranking import highest
from pe_av.media.audio import read_audio
from pe_av.media.frames import iter_frames
from pe_av.media.tracks import MediaError

BEST, WORST = 2, 3  # queries of each direction
FOUND = 3  # items that are shown of what a query found
CANDIDATES = 64  # queries that found their own at once, of which those with the clearest margin are shown
FRAMES, FRAME_HEIGHT = 3, 72  # of the strip of pictures, in pixels
BINS, HALF = 160, 20  # of a waveform: columns, and half its height in units of the drawing
FILE_BYTES = 1_000_000  # larger files cannot be played in the page
PLAYABLE = {
    ".mp4": "video/mp4", ".m4v": "video/mp4", ".webm": "video/webm", ".ogv": "video/ogg",
    ".mp3": "audio/mpeg", ".m4a": "audio/mp4", ".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
}  # fmt: skip

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}  # videos of one frame, which the strip shows in full


def pick_examples(direction: str, ranked: Ranked, embedded: EmbeddedClips, cosine: bool) -> list[dict[str, Any]]:
    """The queries of a direction that were answered best, clearest first, and then those answered worst, worst first.

    Returns:
        one {"query": side, "rank": of its own, "best": bool, "found": list of items} for each query. An item is
        {"item": side, "score", "rank", "true"}: the first `FOUND`, and the best true one if it is not among them. A
        side is {"clip": row of the embeddings or None, "text": caption or None}.
    """
    query_name, item_name = DIRECTIONS[direction]

    order = ranked.ranks.argsort(stable=True)
    first = order[ranked.ranks[order] == 1]
    candidates = first[:: max(1, -(-len(first) // CANDIDATES))].tolist()
    last = order.flip(0)[: WORST + BEST].tolist()
    looked_at = sorted({*candidates, *last})
    queries, query_of = _side_windows(embedded, query_name, ranked.queries[looked_at])
    items, item_of = _side_windows(embedded, item_name, ranked.items)
    if cosine:
        queries, items = F.normalize(queries, dim=1), F.normalize(items, dim=1)
    # float64 tells near ties apart, and is affordable where the gallery is small
    dtype = torch.float64 if len(items) < 10_000 else torch.float32
    products = highest(queries.to(dtype) @ items.to(dtype).T, item_of, len(ranked.items), 1)
    scores = dict(zip(looked_at, highest(products, query_of, len(looked_at), 0), strict=True))
    true = {query: ranked.target[query][ranked.target[query] >= 0].unique() for query in looked_at}

    def margin(query: int) -> float:
        others = scores[query].index_fill(0, true[query], -torch.inf)
        return (scores[query][true[query]].max() - others.max()).item()

    best = sorted(candidates, key=margin, reverse=True)[:BEST]
    worst = [query for query in last if query not in best][:WORST]
    shown = []
    for query in best + worst:
        values = scores[query]
        own = int(true[query][values[true[query]].argmax()])
        found = values.topk(min(FOUND, len(values))).indices.tolist()
        ranks = dict(zip(found, range(1, FOUND + 1), strict=False)) | {own: int(ranked.ranks[query])}
        shown.append(
            {
                "query": _side(embedded, query_name, int(ranked.queries[query])),
                "rank": int(ranked.ranks[query]),
                "best": query in best,
                "found": [
                    {
                        "item": _side(embedded, item_name, int(ranked.items[item])),
                        "score": values[item].item(),
                        "rank": ranks[item],
                        "true": item in true[query],
                    }
                    for item in (found if own in found else [*found, own])
                ],
            }
        )
    return shown


def _side_windows(embedded: EmbeddedClips, name: str, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(V, D) what one side of some pairs is scored by, and (V,) which of `numbers` each row is of."""
    source = embedded.texts[name] if name in embedded.texts else embedded.embeds[name]
    rows = source if len(numbers) == len(source) else source[numbers]
    if embedded.windows is None:
        return rows, torch.arange(len(rows))
    return windows_of(embedded.windows, embedded.texts, name, rows, numbers)


def _side(embedded: EmbeddedClips, name: str, number: int) -> dict[str, Any]:
    if name.startswith("text_"):
        return {"clip": None, "text": embedded.sentences[number]}
    text = int(embedded.captions[number, 0]) if "_plus_text" in name else -1
    return {"clip": number, "text": embedded.sentences[text] if text >= 0 else None}


def clips_of_rows(embedded: EmbeddedClips, manifest: Manifest, rows: Iterable[int]) -> dict[int, Clip]:
    """The clips of some rows of the embeddings, which lack the clips that were damaged."""
    wanted = sorted(set(rows))
    if len(embedded.ids) == len(manifest):
        return {row: manifest[row] for row in wanted}
    clips, row, last = {}, 0, wanted[-1] if wanted else -1
    for clip in manifest:
        if row > last:
            break
        if clip.id == embedded.ids[row]:
            if row in set(wanted):
                clips[row] = clip
            row += 1
    return clips


def picture_of(clip: Clip, max_seconds: float) -> dict[str, Any]:
    """What a page shows of a clip, as far as it can be read: {"frames": data URI of a strip of pictures, "width": of
    the strip in pixels, "waveform": path of an SVG that is `BINS` wide and 2 · `HALF` high, "seconds": of the audio}.
    """
    shown: dict[str, Any] = {}
    segment = {"max_seconds": max_seconds, "start": clip.start, "end": clip.end}
    # what could be read when it was embedded may be gone or damaged now, which should not cost the report
    try:
        if clip.video is not None:
            frames = torch.cat(list(iter_frames(clip.video, num_frames=FRAMES, **segment)))
            frames = frames.unique_consecutive(dim=0) if len(frames) > 1 else frames  # an image is one frame
            width = min(max(round(FRAME_HEIGHT * frames.shape[3] / frames.shape[2]), 24), 192)
            strip = torch.cat(list(VF.resize(frames, [FRAME_HEIGHT, width], antialias=True)), dim=2)
            shown["frames"] = data_uri("image/jpeg", bytes(encode_jpeg(strip, quality=80).numpy()))
            shown["width"] = strip.shape[2]
    except (MediaError, OSError):
        pass
    try:
        if clip.audio is not None:
            waveform, rate = read_audio(clip.audio, **segment)
            shown |= {"waveform": _outline(waveform.mean(0)), "seconds": waveform.shape[1] / rate}
    except (MediaError, OSError):
        pass
    return shown


def _outline(waveform: Tensor) -> str:
    """(samples,) -> the outline of the waveform, forth along the maxima and back along the minima."""
    bins = waveform[torch.linspace(0, len(waveform) - 1, max(BINS, len(waveform) // BINS * BINS)).long()].view(BINS, -1)
    loudest = max(waveform.abs().max().item(), 1e-3)
    high, low = ((HALF - HALF * bound / loudest).round().int().tolist() for bound in (bins.amax(1), bins.amin(1)))
    points = [*enumerate(high), *reversed(list(enumerate(low)))]
    return "M" + "L".join(f"{x} {y}" for x, y in points) + "Z"


def playable(clip: Clip) -> tuple[list[tuple[str, Path]], str | None]:
    """The files of a clip that a browser can play and that are small, as (media type, path), and why there are none."""
    if clip.start or clip.end is not None:
        return [], "segments of longer files"
    files, reason = [], None
    for source in dict.fromkeys(source for source in (clip.video, clip.audio) if source is not None):
        path = Path(source)
        if path.suffix.lower() in IMAGES:
            continue
        kind = PLAYABLE.get(path.suffix.lower())
        if kind is None:
            reason = "inside a tar, or in formats that browsers do not play"
        elif not path.is_file():
            reason = "gone"
        elif path.stat().st_size > FILE_BYTES:
            reason = f"larger than {FILE_BYTES / 1e6:g} MB"
        else:
            files.append((kind, path))
    return files, None if files else reason


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shown_rows(examples: Mapping[str, list[dict[str, Any]]]) -> list[int]:
    """The rows of all clips in the examples, each once, in the order in which they appear."""
    sides = (
        side
        for queries in examples.values()
        for example in queries
        for side in (example["query"], *(found["item"] for found in example["found"]))
    )
    return list(dict.fromkeys(side["clip"] for side in sides if side["clip"] is not None))
