"""Shards read as a stream beside plain webdataset, without decoding: `python benchmarks/stream.py`.

For a disk, a command and a local HTTP server: samples/s and MB/s of `webdataset.WebDataset`, of our reading alone, and
of a whole `StreamLoader` with two workers that get every file and look at its size; the best of three passes, in turns.
"""

import argparse
import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from webdataset import TarWriter, WebDataset

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, installed or not

from pe_av.data.manifest import Clip
from pe_av.data.remote import read_shard
from pe_av.loading.stream import StreamLoader

SHARDS, BATCH = 8, 20


def look(clip: Clip) -> dict:
    return {"id": clip.id, "size": os.path.getsize(clip.audio)}


def together(items: list[dict], picks: list[int]) -> dict:
    return {"items": items, "bad": [item for item in items if "error" in item]}


def batches_of(urls: list[str]) -> Iterator[dict]:
    loader = StreamLoader(urls, look, together, BATCH, num_workers=2, time_limit=60, shuffle_window=100)
    try:
        for batch in loader:
            assert not batch["bad"], batch["bad"][0]
            yield batch
    finally:
        loader.close()


def seconds(ways: dict[str, Callable[[], Iterable]], samples: int) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for way, read in ways.items():
            started = time.perf_counter()
            count = sum(1 for _ in read())
            assert count == samples, f"{way}: {count} of {samples}"
            best[way] = min(best[way], time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1600, help="divides by 40")
    parser.add_argument("--kb", type=int, default=200, help="size of a sample's file")
    arguments = parser.parse_args()
    samples = arguments.samples
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(SHARDS):
            with TarWriter(f"{folder}/{shard}.tar") as writer:
                for number in range(samples // SHARDS):
                    content = os.urandom(1000 * arguments.kb)
                    writer.write({"__key__": f"{shard}-{number}", "json": {"caption": "x"}, "wav": content})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            time.sleep(2)
            for name, place in (
                ("disk", f"{folder}/%d.tar"),
                ("command", f"pipe:cat {folder}/%d.tar"),
                ("http", f"http://127.0.0.1:{port}/%d.tar"),
            ):
                urls = [place % shard for shard in range(SHARDS)]
                batches = batches_of(urls)  # without end: its workers start in the first pass
                ways = {
                    "webdataset": functools.partial(WebDataset, urls, shardshuffle=False),
                    "read_shard": lambda urls=urls: chain.from_iterable(map(read_shard, urls)),
                    "StreamLoader": lambda b=batches: chain.from_iterable(
                        x["items"] for x in islice(b, samples // BATCH)
                    ),
                }
                taken = seconds(ways, samples)
                batches.close()
                for way, time_taken in taken.items():
                    speed, share = samples / time_taken, taken["webdataset"] / time_taken
                    mb = speed * arguments.kb / 1000
                    print(f"{name:8} {way:13} {speed:7.0f} samples/s {mb:7.0f} MB/s  {share:.2f} of webdataset")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
