"""decord and torchcodec beside PyAV: the same frames of ordinary files, and PyAV reads the others."""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from test_media import noise, read_frames, remux, write_frames

from pe_av.config import ConfigError, ModelConfig
from pe_av.config.data import READERS, DataConfig
from pe_av.media.processor import Processor
from pe_av.media.readers import read_by
from pe_av.media.timeline import read_timeline

B_FRAMES = {"bf": "2", "g": "20"}
SELECTIONS = ({}, {"num_frames": 16}, {"frames_per_second": 7, "start": 1.1, "end": 2.0})


def pictures(count: int = 60) -> list[np.ndarray]:
    """Pictures that move by a few pixels from frame to frame, so that no two are the same."""
    wide = np.kron(noise(1, 24, 60)[0], np.ones((4, 4, 1), np.uint8))
    return [wide[i % 40 : i % 40 + 48, 2 * i : 2 * i + 64] for i in range(count)]


def closed_files(folder: Path) -> list[Path]:
    """What every reader reads rightly."""
    return [
        write_frames(folder / "closed.mp4", pictures(), options=B_FRAMES),
        write_frames(folder / "closed.mkv", pictures(), options=B_FRAMES),
        write_frames(folder / "closed.webm", pictures(), "libvpx-vp9"),
        write_frames(folder / "uneven.mp4", pictures(), stamps=[70 + 3 * i + i % 2 for i in range(60)]),
    ]


def open_files(folder: Path) -> list[Path]:
    """Frames after a keyframe are shown before it: decord gives wrong frames of these."""
    return [
        write_frames(folder / "open.mp4", pictures(), options={**B_FRAMES, "x264-params": "open-gop=1"}),
        write_frames(folder / "hevc.mp4", pictures(), "libx265", options={"x265-params": "keyint=20:log-level=0"}),
        write_frames(folder / "mpeg4.mp4", pictures(), "mpeg4", options={"bf": "2"}),
    ]


def other_files(folder: Path) -> list[Path]:
    """What one or the other gives wrong frames of, or refuses."""
    whole = write_frames(folder / "whole.mp4", pictures(), options=B_FRAMES)
    return [
        write_frames(folder / "b_frames.avi", pictures(), "mpeg4", options={"bf": "2"}),
        write_frames(folder / "stream.ts", pictures(), options=B_FRAMES),
        write_frames(folder / "deep.mp4", pictures(), "libx265", "yuv420p10le", {"x265-params": "log-level=0"}),
        write_frames(folder / "sideways.mp4", pictures(), rotate=90),
        remux(whole, folder / "edit_list.mp4", shift=0.5),
        remux(write_frames(folder / "w.mkv", pictures(), options={**B_FRAMES, "bf": "0"}), folder / "cut.mkv", first=3),
    ]


def compare(reader: str, paths: Sequence[str | Path], own: bool) -> None:
    """Whether a reader gives PyAV's frames; `own`: whether it decodes them itself."""
    for path in paths:
        stamps = read_timeline(path, 0, None, None).stamps
        assert len(list(read_by(reader, path, stamps))) == (len(stamps) if own else 0), path
        for selection in SELECTIONS:
            expected, found = read_frames(path, **selection), read_frames(path, reader=reader, **selection)
            assert torch.equal(found, expected), (path, selection)


def test_decord_reads_the_same_frames(tmp_path: Path):
    pytest.importorskip("decord")
    compare("decord", closed_files(tmp_path), own=True)
    compare("decord", [*open_files(tmp_path), *other_files(tmp_path)], own=False)


def test_decord_alone_would_read_wrong_frames(tmp_path: Path):
    """The reason for the rule: when a later version of decord is right, this fails, and the rule can go."""
    decord = pytest.importorskip("decord")
    for path in (*open_files(tmp_path), other_files(tmp_path)[0]):
        wanted = [i * 59 // 15 for i in range(16)]
        found = torch.from_numpy(decord.VideoReader(str(path)).get_batch(wanted).asnumpy()).permute(0, 3, 1, 2)
        wrong = (found.float() - read_frames(path, num_frames=16).float()).abs().mean((1, 2, 3)) > 5
        assert wrong.sum() > 8, path


@pytest.mark.skipif(sys.platform != "linux" or find_spec("torchcodec") is None, reason="torchcodec is not installed")
def test_torchcodec_reads_the_same_frames(tmp_path: Path):
    """torchcodec is given the FFmpeg in PyAV's wheel, under the names that it looks for, since CI has no other."""
    libraries = tmp_path / "ffmpeg"
    libraries.mkdir()
    for path in (Path(av.__file__).parent.parent / "av.libs").glob("lib[as][vw]*.so.*"):
        name, _, version = path.name.partition(".so.")  # libavutil-5809ad29.so.60.26.102
        (libraries / f"{name.partition('-')[0]}.so.{version.partition('.')[0]}").symlink_to(path)
    own, others = [*closed_files(tmp_path), *open_files(tmp_path)], other_files(tmp_path)
    code = f"from test_readers import compare; compare('torchcodec', {list(map(str, own))}, own=True); "
    code += f"compare('torchcodec', {list(map(str, others))}, own=False)"
    here = Path(__file__).parent
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": f"{here}:{here.parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_cannot_be_used_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch):
    for reader in READERS[1:]:
        monkeypatch.setitem(sys.modules, reader, None)  # as if it were not installed
        monkeypatch.setitem(sys.modules, f"{reader}.decoders", None)
        with pytest.raises(ConfigError, match=rf"reader={reader} needs a package: pip install 'pe-av\[{reader}\]'"):
            Processor(ModelConfig(), reader=reader)
    with pytest.raises(ConfigError, match="data.reader=decrod is unknown; did you mean decord"):
        DataConfig(reader="decrod")
