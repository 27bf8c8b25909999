"""From what users point at, such as a folder or a pattern of file names, to the clips in it."""

import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip, Manifest, read_manifest
from pe_av.data.manifest_formats import FORMATS
from pe_av.data.shards import AUDIO, VIDEO, clips_of_shards, is_shard

PICTURES = {"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"}  # films of one frame


def find_clips(source: str) -> Manifest:
    """The clips of a manifest, of a folder and the folders in it, or of the files that a pattern matches, which are
    media files or tar shards. The id of a media file is its path below the folder, or below the part of the pattern
    without wildcards.

    Raises:
        ConfigError: there is nothing of that kind.
    """
    if Path(source).suffix.lower() in FORMATS and Path(source).is_file():
        return read_manifest(source)
    if os.path.isdir(source):
        folder, found = source, [os.path.join(at, name) for at, _, names in os.walk(source) for name in names]
    else:
        fixed = source[: min((source.find(sign) for sign in "*?[" if sign in source), default=len(source))]
        folder, found = os.path.dirname(fixed) or ".", glob.glob(source, recursive=True)
    found = sorted(path for path in found if os.path.isfile(path))
    media = list(_media(found, folder))
    shards, problems = clips_of_shards(
        filter(is_shard, map(Path, found)), Path(folder), False, {clip.id for clip in media}
    )
    for problem in problems:
        print(problem, file=sys.stderr)
    if not media and not shards:
        what = f"none of its {len(found)} files is a media file or a tar" if found else "there are no such files"
        raise ConfigError(f"{source}: {what}; give a manifest, a folder of media files, or a pattern such as '*.mp4'")
    return Manifest.of(media + shards, folder)


def _media(paths: list[str], folder: str) -> Iterator[Clip]:
    for path in paths:
        ending, name = Path(path).suffix[1:].lower(), os.path.relpath(path, folder)
        if ending in AUDIO | VIDEO | PICTURES:
            yield Clip(name, audio=name if ending in AUDIO | VIDEO else None, video=None if ending in AUDIO else name)
