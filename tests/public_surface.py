"""What users write, for the type checker: `mypy` fails when a public signature no longer says what this relies on."""

from typing import assert_type

import torch
from torch import Tensor

from pe_av import PEAudioFrame, PEAudioVideo, Processor, build_model, embed_items, load_model, save_model
from pe_av.media.processor import Batch
from pe_av.model.summary import Summary

processor = Processor.from_pretrained("folder")
batch = processor(text=["a dog"], audio=["clip.mp4"], videos=["clip.mp4"])
assert_type(batch, Batch)
assert_type(batch.to("cuda"), Batch)
assert_type(processor(audio=torch.zeros(2, 16_000), sampling_rate=16_000), Batch)

model = build_model("tiny", device="cpu", dtype=torch.float32)
assert_type(model, PEAudioVideo | PEAudioFrame)
assert isinstance(model, PEAudioVideo)
out = model(**batch)
video = model.get_video_embeds(batch["pixel_values_videos"], batch["padding_mask_videos"])
assert_type(video, Tensor)
assert_type(model.get_audio_plus_text_embeds(batch["input_ids"], batch["input_values"]), Tensor)
assert_type(model.parameter_counts(), dict[str, int])
assert_type(model.embed(batch), dict[str, Tensor])
assert_type(model.summary(seconds=10), Summary)
assert_type(
    embed_items(model, processor, [{"text": "a dog"}, {"video": "x.jpg"}], batch_size=8),
    tuple[dict[str, Tensor], dict[str, Tensor]],
)

text_only = load_model("folder", device=torch.device("cpu"), towers=("text",))
save_model(text_only, "other")
save_model(load_model("hf:facebook/pe-av-large", dtype=torch.bfloat16), "other", push_to="someone/model")
