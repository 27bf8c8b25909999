"""A page to try a model on: `python -m pe_av.app index=INDEX [frame=CHECKPOINT]`. Needs the extra `app`.

Three tabs: search in a folder of embeddings by words, by a sound that is recorded or uploaded, or by a film; how well a
text fits each piece of a file, and how the pieces resemble each other; and, with the checkpoint of a PEAudioFrame, when
something is heard.
"""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from pe_av.checkpoint import load_model
from pe_av.config import AppConfig, ConfigError, WindowsConfig
from pe_av.config.compose import run_command
from pe_av.data.manifest import Clip, Manifest
from pe_av.device import to_device
from pe_av.evaluation.events import plot_recordings
from pe_av.evaluation.windows import windowed
from pe_av.index import Index
from pe_av.media.processor import Processor
from pe_av.media.tracks import MissingTrackError
from pe_av.model.pe_audio_frame import PEAudioFrame
from pe_av.search import Searcher
from pe_av.search_page import page_of

MAX_SECONDS = 600.0  # of a file that is looked at piece by piece
NAMES = {"audio": "sound", "video": "picture", "audio_video": "both"}


def results(searcher: Searcher, query: dict[str, Any], within: str | None, top: int) -> str:
    """What a search finds, as HTML: a page within the page, whose style is its own."""
    hits = searcher.search(**query, within=within, top=top)
    shown = {name: value if name == "text" or value is None else Path(value).name for name, value in query.items()}
    page = html.escape(page_of(hits, shown))
    return f'<iframe title="what was found" srcdoc="{page}" style="width: 100%; height: 75vh; border: 0"></iframe>'


@torch.inference_mode()
def pieces(searcher: Searcher, file: str, text: str, seconds: float) -> Figure:
    """For each embedding of a file's pieces: the probability that a text belongs to each, and their cosines.

    Args:
        seconds: length of a piece.
    """
    model, processor = searcher.model, searcher.processor
    windows = list(windowed(Manifest.of([Clip(Path(file).name, file, file)]), WindowsConfig(seconds)))
    embeds: dict[str, list[tuple[float, Tensor]]] = {}  # of the pieces that have it: when they begin, and (1, D)
    for window in windows[: int(MAX_SECONDS / seconds)]:
        limits = {"start": window.start, "end": window.end, "max_seconds": seconds + 1}
        inputs: dict[str, Tensor] = {}
        for read, batch in (
            (processor.audio_item, processor.batch_audio),
            (processor.video_item, processor.batch_videos),
        ):
            try:
                inputs |= batch([read(file, **limits)])
            except MissingTrackError:
                pass  # a sound has no picture, and a silent film no sound
        for name, value in model.embed(to_device(inputs, searcher.device)).items():
            embeds.setdefault(name, []).append((window.start, value))
    tokens = to_device(processor(text=text), searcher.device)
    texts = model.embed(tokens)
    figure = Figure(figsize=(11, 6.5), dpi=100, layout="constrained")
    panels = figure.subplots(2, len(embeds), squeeze=False, height_ratios=(1, 2))
    for (curve, picture), (name, values) in zip(panels.T, embeds.items(), strict=True):
        starts, rows = [start for start, _ in values], torch.cat([value for _, value in values])
        pairing = "audio_video_text" if name == "audio_video" else f"{name}_text"
        probability = model.logits[pairing](rows, texts[f"text_{name}"])[:, 0].sigmoid().cpu()
        edges = [*starts, starts[-1] + seconds]
        curve.stairs(probability, edges, baseline=None, linewidth=2)
        curve.set(title=NAMES[name], ylim=(0, 1.02), xlim=(edges[0], edges[-1]), xlabel="seconds")
        unit = F.normalize(rows.float(), dim=1)
        shown = picture.imshow((unit @ unit.T).cpu(), vmax=1)
        picture.set(title="cosine of two pieces", xlabel="piece", ylabel="piece")
        figure.colorbar(shown, ax=picture, shrink=0.7)
    panels[0, 0].set_ylabel(f"probability of\n“{text[:40]}”")
    return figure


class Listener:
    """When something is heard, by a PEAudioFrame."""

    def __init__(self, checkpoint: str, device: torch.device):
        self.model, self.device = load_model(checkpoint, device), device
        if not isinstance(self.model, PEAudioFrame):
            raise ConfigError(f"frame={checkpoint} is no PEAudioFrame; python -m pe_av.training.frame trains one")
        self.processor = Processor.from_pretrained(checkpoint)

    @torch.inference_mode()
    def curve(self, audio: str, text: str, threshold: float) -> tuple[Figure, str]:
        """The probability over time, and the spans in words."""
        batch = self.processor(text=text, audio=audio, max_seconds=MAX_SECONDS)
        out = self.model(**to_device(batch, self.device), threshold=threshold)
        recording = {
            "caption": text,
            "waveform": batch["input_values"][0, 0],
            "sampling_rate": self.model.config.audio.codec.sampling_rate,
            "scores": out.logits[0].sigmoid().float().cpu(),
            "spans": [],
        }
        spans = ", ".join(f"{start:.2f}–{end:.2f} s" for start, end in out.spans[0])
        return plot_recordings([recording], self.model.seconds_per_position, threshold), spans or "not heard"


def build(searcher: Searcher, listener: Listener | None) -> Any:
    """The page, a `gradio.Blocks`.

    Raises:
        ConfigError: Gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError:
        raise ConfigError("the page needs Gradio: pip install 'pe-av[app]'") from None

    def answer(do: Callable[..., Any]) -> Callable[..., Any]:
        """What users did wrong is shown on the page, and not only in the terminal."""

        def safely(*inputs: Any) -> Any:
            try:
                return do(*inputs)
            except (ValueError, OSError) as error:
                raise gr.Error(str(error), print_exception=False) from error

        return safely

    def search(text: str, audio: str | None, film: str | None, picture: str | None, within: str, top: float) -> str:
        query = {"text": text.strip() or None, "audio": audio, "video": film or picture}
        return results(searcher, query, None if within == "what fits" else within, int(top))

    def cut(text: str, film: str | None, sound: str | None, seconds: float) -> Figure:
        file = film or sound
        if not file or not text.strip():
            raise ConfigError("give a film or a sound, and a text")
        return pieces(searcher, file, text, seconds)

    with gr.Blocks(title="PE-AV") as page:
        gr.Markdown(f"# PE-AV\n{len(searcher.index):,} clips of `{searcher.index.record['source']}`")
        with gr.Tab("Search"):
            with gr.Row():
                with gr.Column(scale=2):
                    text = gr.Textbox(label="in words")
                    within = gr.Dropdown(["what fits", *searcher.index.embeddings], label="compared with")
                    top = gr.Slider(1, 50, 12, step=1, label="clips")
                    button = gr.Button("Search", variant="primary")
                audio = gr.Audio(type="filepath", sources=["microphone", "upload"], label="a sound")
                film = gr.Video(label="a film", sources=["upload"])
                picture = gr.Image(type="filepath", label="or a picture", sources=["upload"])
            found = gr.HTML()
            for start in (button.click, text.submit):
                start(answer(search), [text, audio, film, picture, within, top], found, api_name="search")
        with gr.Tab("Piece by piece"):
            with gr.Row():
                with gr.Column():
                    words = gr.Textbox(label="a text")
                    length = gr.Slider(0.2, 30, 1, label="seconds of a piece")
                    look = gr.Button("Compare", variant="primary")
                whole = gr.Video(label="a film", sources=["upload"])
                sound = gr.Audio(type="filepath", label="or a sound")
            drawn = gr.Plot(label="")
            look.click(answer(cut), [words, whole, sound, length], drawn, api_name="pieces")
        if listener is not None:
            with gr.Tab("When is it heard?"):
                with gr.Row():
                    with gr.Column():
                        heard = gr.Textbox(label="what is listened for")
                        threshold = gr.Slider(0, 1, 0.5, label="threshold")
                        listen = gr.Button("Listen", variant="primary")
                    recording = gr.Audio(type="filepath", label="a sound")
                spans, curve = gr.Textbox(label="heard at"), gr.Plot(label="")

                def when(audio: str | None, text: str, limit: float) -> tuple[Figure, str]:
                    if not audio:
                        raise ConfigError("give a sound")
                    return listener.curve(audio, text, limit)

                listen.click(answer(when), [recording, heard, threshold], [curve, spans], api_name="listen")
    return page


def serve(config: AppConfig, _: Path | None = None) -> None:
    """Show the page until the process is interrupted."""
    searcher = Searcher(Index(config.index), config.checkpoint, config.device)
    listener = None if config.frame is None else Listener(config.frame, searcher.device)
    build(searcher, listener).launch(server_name=config.host, server_port=config.port)


if __name__ == "__main__":
    run_command(AppConfig, "app", serve)
