"""A checkpoint as an encoder of MTEB (the package `mteb`), for its tasks of text, audio, video and their combinations.

    import mteb
    from pe_av.evaluation.mteb_encoder import MTEBEncoder

    model = MTEBEncoder("runs/<date>/checkpoint")
    results = mteb.evaluate(model, mteb.get_tasks(tasks=["ClothoT2ARetrieval"]))

Embeddings are compared by the dot product, as they were trained to be. MTEB has a wrapper of its own around the model
of transformers, which brings them to unit length.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pe_av.checkpoint import load_model
from pe_av.config import HEADS, ConfigError
from pe_av.device import pick_device, to_device
from pe_av.media.processor import Processor
from pe_av.media.timeline import spread_indices
from pe_av.model.pe_audio_video import PEAudioVideo


class MTEBEncoder(AbsEncoder):
    """See the head of this file."""

    def __init__(
        self,
        model_name: str | Path,
        revision: str | None = None,
        *,
        device: str | None = None,
        max_seconds: float | None = 30.0,
    ):
        """
        Args:
            model_name: folder of a native checkpoint.
            revision: a name of yours for its version, under which MTEB stores results.
            max_seconds: longer sounds are cut; None: they are taken whole.
        Raises:
            ConfigError, CheckpointError: not a checkpoint of PEAudioVideo.
        """
        model = load_model(model_name, pick_device(device or "auto"))
        if not isinstance(model, PEAudioVideo):
            raise ConfigError(f"{model_name} is a PEAudioFrame, which has no embedding of a whole clip")
        self.model, self.processor, self.max_seconds = model, Processor.from_pretrained(model_name), max_seconds
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"pe-av/{Path(model_name).resolve().name}",
                "revision": revision or "local",
                "modalities": ["text", "audio", "video"],
                "embed_dim": model.config.output_dim,
                "similarity_fn_name": ScoringFunction.DOT_PRODUCT,
                "framework": ["PyTorch"],
            }
        )

    @torch.inference_mode()
    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        show_progress_bar: bool = True,
        **_: Any,
    ) -> np.ndarray:
        """(N, D) float32 of MTEB's DataLoader over N items, whose columns are some of text, image, audio and video."""
        columns = set(inputs.dataset.features)
        given = {"video" if name == "image" else name for name in columns & {"text", "image", "audio", "video"}}
        others = {"query": "document", "document": "query"}
        compared = (
            task_metadata.get_modalities(PromptType(others[prompt_type])) if prompt_type else task_metadata.modalities
        )
        names = heads_for(given, {"video" if name == "image" else name for name in compared}, self.model.config.heads)
        # the processor resamples and samples frames itself, by the rules of the model
        inputs.collate_fn = lambda rows: {name: [row[name] for row in rows] for name in rows[0]}
        found = []
        for batch in track(inputs, "encoding", console=Console(stderr=True, quiet=not show_progress_bar)):
            embeds = self.model.embed(to_device(self._inputs(batch, given), next(self.model.parameters()).device))
            found.append(sum(embeds[name] for name in names).float().cpu())
        return torch.cat(found).numpy()

    def _inputs(self, batch: dict[str, list[Any]], given: Collection[str]) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        if "text" in given:
            # some corpora of MTEB have empty texts
            inputs |= self.processor.batch_text([text if text.strip() else "." for text in batch["text"]])
        if "audio" in given:
            items = [
                self.processor.audio_item(np.atleast_2d(one["array"]), int(one["sampling_rate"]), self.max_seconds)
                for one in batch["audio"]
            ]
            inputs |= self.processor.batch_audio(items)
        if "video" in given:
            frames = (self._frames(one) for one in batch["video" if "video" in batch else "image"])
            inputs |= self.processor.batch_videos([self.processor.video_item(one) for one in frames])
        return inputs

    def _frames(self, video: Any) -> Tensor | np.ndarray:
        """The frames that the model samples, of a picture, of frames, or of torchcodec's decoder of a film."""
        if hasattr(video, "convert"):  # a PIL image
            return np.asarray(video.convert("RGB"))[None]
        if isinstance(video, Tensor | np.ndarray):
            return video
        count, wanted = video.metadata.num_frames, self.model.config.video.num_frames
        return video.get_frames_at(list(range(count)) if wanted is None else spread_indices(count, wanted)).data


def heads_for(given: Collection[str], compared: Iterable[str], heads: Collection[str]) -> list[str]:
    """The embeddings whose sum stands for an item; a single one, where one was trained for it.

    Args:
        given: what the item consists of.
        compared: what the items that it is compared with consist of.
        heads: the embeddings of the model.
    Raises:
        ConfigError: the model has no embedding of something that is given.
    """
    given, media = set(given), set(given) - {"text"}
    others = set(compared) - {"text"}
    with_text = f"text_{'_'.join(name for name in ('audio', 'video') if name in (others or {'audio', 'video'}))}"
    if media and "text" in given:
        joint = "_".join(media) + "_plus_text"
        # a joint embedding was trained against the other modality, and against nothing else
        names = [joint] if len(media) == 1 and others == {"audio", "video"} - media else [_of_media(media), with_text]
    else:
        names = [with_text if given == {"text"} else _of_media(media)]
    missing = [name for name in names if name not in heads]
    if missing or not given:
        raise ConfigError(
            f"the model has no embedding {', '.join(missing)} for items of {', '.join(given) or 'nothing'}"
        )
    return names


def _of_media(media: Collection[str]) -> str:
    return next(name for name in HEADS if set(HEADS[name]) - {"fusion"} == set(media))
