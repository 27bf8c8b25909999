"""The published sizes themselves: the same random weights in our model and in transformers', one after the other, since
both at once are more than many machines hold. Tens of gigabytes of disk and several minutes each.

    pytest -m slow tests/test_published_sizes.py -s     (shows the figures)
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import random_batch, randomize, relative_error
from published_models import EMBEDDINGS, LOGITS
from torch import Tensor
from transformers import PeAudioVideoModel

from pe_av import build_model, load_model, save_model
from pe_av.conversion.write_checkpoint import convert

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SECONDS, FRAMES, TOKENS = 2, 2, 24  # two seconds and two frames of each of two clips


def inputs(size: str) -> dict[str, Tensor]:
    config = build_model(size, device="meta").config
    batch = random_batch(config, rows=((TOKENS, 25 * SECONDS, FRAMES),) * 2)
    batch["pixel_values_videos"].clamp_(-1, 1)
    return {name: value for name, value in batch.items() if "mask" not in name}


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Prints the seconds and the peak memory of what is done inside."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(f"\n{what}: {seconds:.1f} s, peak {peak / 1e6:.1f} GB", flush=True)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest would keep the last three


@pytest.mark.parametrize("size", ["base", "large"])
def test_transformers_has_our_numbers(folder: Path, size: str):
    """Every embedding and all logits, in float32, from weights with which every parameter matters; and nothing is
    missing or left over when transformers reads what we exported."""
    batch = inputs(size)
    model = build_model(size, "meta").to_empty(device="cpu")
    save_model(randomize(model), folder / "native")
    del model
    with reported(f"{size}: loading ours and one batch"), torch.inference_mode():
        found = load_model(folder / "native")(**batch)
    with reported(f"{size}: conversion to transformers"):
        convert(folder / "native", folder / "hf", "hf")
    shutil.rmtree(folder / "native")
    with reported(f"{size}: loading theirs and one batch"), torch.inference_mode():
        theirs, report = PeAudioVideoModel.from_pretrained(folder / "hf", output_loading_info=True)
        assert not any(report.values()), report
        expected = theirs.eval()(**batch)
    names = [*(f"{name}_embeds" for name in EMBEDDINGS), *(f"logits_{name}" for name in LOGITS)]
    errors = {name: relative_error(getattr(found, name), getattr(expected, name)) for name in names}
    print(f"{size}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) <= 1e-4, errors


def test_bfloat16_at_large():
    """All layers of `large`, with weights as they start: their rounding is amplified no more than trained ones'."""
    batch = inputs("large")
    model = build_model("large")
    with reported("large in float32"), torch.inference_mode():
        expected = model(**batch).embeds()
    model.bfloat16()
    with reported("large in bfloat16"), torch.inference_mode():
        found = model(**batch).embeds()
    assert set(found) == set(EMBEDDINGS)
    cosines = {name: torch.cosine_similarity(found[name].float(), expected[name]).min().item() for name in found}
    print("cosine to float32: " + ", ".join(f"{name} {cosine:.6f}" for name, cosine in cosines.items()))
    assert min(cosines.values()) >= 0.999, cosines


def test_conversion_streams(folder: Path):
    """In both directions the peak, mapped pages included, is at most 1.3 times the file; the time is only reported,
    since it is the disk's."""
    command = [sys.executable, "benchmarks/conversion.py", "preset=large", f"folder={folder}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr
    print("\n" + done.stdout)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["to"] for result in results] == ["hf", "native"]
    assert all(result["peak_per_file"] <= 1.3 for result in results)
