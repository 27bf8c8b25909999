"""The results of a search as one HTML page that needs no network: pictures, waveforms and players of what was found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pe_av.data.manifest import Clip
from pe_av.evaluation.examples import BINS, FRAME_HEIGHT, HALF, data_uri, picture_of, playable
from pe_av.evaluation.html_report import template_of
from pe_av.search import Hit

PAGE_BYTES = 20_000_000  # films and sounds that would make the page larger cannot be played in it
SECONDS = 30.0  # of a clip that are drawn, at most


def page_of(hits: Sequence[Hit], query: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        query: what was looked for: "text", and the paths "audio" and "video"; None for what was not given.
    """
    left, cards = PAGE_BYTES, []
    for hit in hits:
        clip = Clip(hit.id, hit.audio, hit.video, start=hit.start, end=hit.end)
        files, reason = playable(clip)
        cost = sum(4 * file.stat().st_size // 3 for _, file in files)
        if cost > left:
            files, reason = [], f"beyond the {PAGE_BYTES / 1e6:g} MB of this page"
        left -= cost if files else 0
        media = [(kind, data_uri(kind, file.read_bytes())) for kind, file in files]
        cards.append({"hit": hit, "picture": picture_of(clip, SECONDS), "media": media, "reason": reason})
    size = {"bins": BINS, "height": 2 * HALF, "frame_height": FRAME_HEIGHT}
    return template_of(Path(__file__).with_name("search.html.jinja")).render(
        query={name: value for name, value in query.items() if value is not None}, cards=cards, size=size
    )
