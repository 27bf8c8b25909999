"""Shards read as a stream: the same samples from every place, in an order that resumes exactly, and what can fail."""

import functools
import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import kill_and_resume
from test_data import write_clip
from test_media import write_audio, write_wav
from test_processor import make_config, make_tokenizer

from pe_av.config import ConfigError
from pe_av.data import remote
from pe_av.data.clips import ClipReader
from pe_av.data.manifest import Clip
from pe_av.data.remote import first_samples, read_shard, shard_urls
from pe_av.loading.batch import Collate
from pe_av.loading.stream import StreamLoader
from pe_av.media.processor import Processor

# webdataset, moto and fsspec are imported where they are used: the workers import this file for `read`, and need none
SHARDS, SAMPLES = 7, 11  # no multiples of each other, of the batches or of the windows


def write_shards(folder: Path, shards: int = SHARDS, samples: int = SAMPLES) -> list[str]:
    """Shards by webdataset's own writer: sample "3-05" is the sixth of the fourth shard, and its audio says so too."""
    from webdataset import TarWriter

    urls = []
    for shard in range(shards):
        urls.append(str(folder / f"{shard:03d}.tar"))
        with TarWriter(urls[-1]) as writer:
            for sample in range(samples):
                name = f"{shard}-{sample:02d}"
                note = {"caption": f"sound {name}", "visual_caption": ["a", "b"]}
                writer.write({"__key__": name, "json": note, "wav": name.encode() + b"." * 3000})
    return urls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    write_shards(path)
    return path


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.04, 0.08))


def read(clip: Clip) -> dict:
    """Return the bytes of the clip's file, or do what they say: hang, crash or be damaged."""
    content = Path(clip.audio).read_bytes().rstrip(b".").decode()
    if content.startswith("hang"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if content.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if content.startswith("bad"):
        return {"id": clip.id, "error": f"{clip.audio}: is bad"}
    if multiprocessing.parent_process() is not None:
        time.sleep(random.random() * 0.01)  # items come back in another order
    return {"id": clip.id, "value": content, "captions": clip.captions, "seen": (clip.video, os.getpid())}


def together(items: list[dict], picks: list[int]) -> dict:
    bad = [item for item in items if "error" in item]
    return {"values": [i["value"] for i in items if "value" in i], "bad": bad, "items": items, "picks": picks}


def load(urls, batches: int, state: dict | None = None, batch_size: int = 4, **how) -> list[dict]:
    """The first batches, each with the "state" after it."""
    loader = StreamLoader(urls, read, together, batch_size, **{"seed": 3, "shuffle_window": 10} | how)
    if state is not None:
        loader.load_state_dict(json.loads(json.dumps(state)))
    found = []
    iterator = iter(loader)
    for batch in islice(iterator, batches):
        found.append(batch | {"state": loader.state_dict()})
    iterator.close()
    loader.close()
    return found


def values(batches: list[dict]) -> list[str]:
    return [value for batch in batches for value in batch["values"]]


def leftovers() -> set[str]:
    """Files of samples that were left in shared memory or in the folder of temporary files."""
    places = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    return {str(path) for place in places if place.is_dir() for path in place.iterdir() if "clip" in path.name}


def in_order(urls: list[str]) -> list[str]:
    """The contents of the samples as webdataset reads them."""
    from webdataset import WebDataset

    return [s["wav"].rstrip(b".").decode() for s in WebDataset(urls, shardshuffle=False)]


# ---------------------------------------------------------------------------------------------------------------------
# places


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve(folder) -> Iterator:
    """Starts an HTTP server on the shards with a handler; gives its address."""
    servers = []

    def start(handler: type = Quiet) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def s3(folder, monkeypatch) -> Iterator:
    """A server that speaks S3, with the shards in its bucket."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # those of servers that are gone
    filesystem = fsspec.filesystem("s3")
    filesystem.makedirs("corpus", exist_ok=True)  # the server's memory outlives it
    for path in folder.glob("*.tar"):
        filesystem.put_file(str(path), f"corpus/train/{path.name}")
    yield filesystem
    server.stop()


def test_every_place_gives_what_webdataset_reads(folder, serve, s3, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 10_000)  # a shard takes several
    http, last = serve(), f"{SHARDS - 1:03d}"
    places = [
        [str(folder / f"{shard:03d}.tar") for shard in range(SHARDS)],
        f"{folder}/*.tar",
        f"file://{folder}/*.tar",
        f"{folder}/{{000..{last}}}.tar",
        f"pipe:cat {folder}/{{000..{last}}}.tar",
        f"{http}/{{000..{last}}}.tar",
        f"{http}/*.tar",
        f"s3://corpus/train/{{000..{last}}}.tar",
        "s3://corpus/train/*.tar",
        [f"{http}/{{000..002}}.tar", "s3://corpus/train/{003..005}.tar", f"pipe:cat {folder}/006.tar"],
    ]
    expected = in_order(places[0])
    assert len(expected) == SHARDS * SAMPLES
    for urls in places:
        found = load(urls, SHARDS, batch_size=SAMPLES, shuffle_shards=False, shuffle_window=1)
        assert values(found) == expected, urls
        assert not any(batch["bad"] for batch in found)
    item = found[0]["items"][5]
    assert item["id"] == "000/0-05" and item["captions"] == {None: ["sound 0-05"], "visual": ["a", "b"]}


def test_compressed_shards_and_captions_in_text_files(tmp_path):
    from webdataset import TarWriter

    with TarWriter(str(tmp_path / "a.tar.gz")) as writer:
        for number in range(3):
            writer.write({"__key__": f"some/{number}", "txt": f"a bell {number}\n", "audio.wav": str(number).encode()})
    [batch] = load(str(tmp_path / "*.tar.gz"), 1, batch_size=3, shuffle_window=1)
    assert batch["values"] == ["0", "1", "2"]
    assert [item["captions"] for item in batch["items"]] == [{None: [f"a bell {i}"]} for i in range(3)]
    assert captions(f"{tmp_path}/*.tar.gz", 2) == ["a bell 0", "a bell 1"]


def captions(urls: str, limit: int) -> list[str]:
    return [text for s in first_samples(urls, limit) for texts in s.clip.captions.values() for text in texts]


def sample_parts(urls: str, limit: int) -> set[str]:
    """Which of sound, picture and kinds of caption occur."""
    clips = [sample.clip for sample in first_samples(urls, limit)]
    media = {name for clip in clips for name in ("audio", "video") if getattr(clip, name) is not None}
    return media | {f"{kind}_caption" if kind else "caption" for clip in clips for kind in clip.captions}


def test_what_the_first_samples_have(folder, tmp_path):
    from webdataset import TarWriter

    assert sample_parts(f"{folder}/*.tar", 5) == {"audio", "caption", "visual_caption"}
    assert captions(f"{folder}/*.tar", 2) == ["sound 0-00", "a", "b", "sound 0-01", "a", "b"]
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "1", "mp4": b"1"})
        writer.write({"__key__": "2", "wav": b"2", "json": {"audio_caption": "x"}})
    assert sample_parts(f"{tmp_path}/*.tar", 1) == {"audio", "video"}
    assert sample_parts(f"{tmp_path}/*.tar", 9) == {"audio", "video", "audio_caption"}
    with pytest.raises(ConfigError, match=r"none of the 1 shards gave a sample: .*nothing\.tar: no such shard"):
        sample_parts(f"{tmp_path}/nothing.tar", 9)


# ---------------------------------------------------------------------------------------------------------------------
# the order


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_every_epoch_and_all_batches_are_full(folder, world):
    ranks = [load(f"{folder}/*.tar", 60, rank=rank, world=world) for rank in range(world)]
    assert {len(batch["values"]) for found in ranks for batch in found} == {4}
    # the first epoch of a rank has as many samples as its shards: together every sample once
    shares = [len(range(rank, SHARDS, world)) * SAMPLES for rank in range(world)]
    for epoch in range(2):
        seen = [v for found, n in zip(ranks, shares, strict=True) for v in values(found)[epoch * n : (epoch + 1) * n]]
        if epoch == 0 or world == 1:  # later, the ranks' shares are of other sizes
            assert sorted(seen) == sorted(in_order(sorted(map(str, folder.glob("*.tar")))))
    orders = [values(load(f"{folder}/*.tar", 60, seed=seed)) for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:77] != orders[0][77:154]
    shards = [[value[0] for value in orders[0][start : start + 77]] for start in (0, 77)]
    assert list(dict.fromkeys(shards[0])) != list(dict.fromkeys(shards[1]))  # another order of shards, too


def test_a_window_is_all_that_is_held_and_shuffles_well(folder, monkeypatch):
    """Every sample moves by less than a window, and no more samples are alive than the window has."""
    total = SHARDS * SAMPLES
    for window in (1, 2, 10, 30, 77, 500):
        alive = [0]
        most = [0]

        class Counted(remote.Sample):
            def __init__(self, *args, alive=alive, most=most):
                super().__init__(*args)
                alive[0] += 1
                most[0] = max(most[0], alive[0])

            def __del__(self, alive=alive):
                alive[0] -= 1

        with monkeypatch.context() as patch:
            patch.setattr(remote, "Sample", Counted)
            found = values(load(f"{folder}/*.tar", total, batch_size=1, shuffle_shards=False, shuffle_window=window))
        place = {value: at for at, value in enumerate(in_order(sorted(map(str, folder.glob("*.tar")))))}
        moved = np.array([at - place[value] for at, value in enumerate(found)])
        assert sorted(found) == sorted(place) and np.abs(moved).max() < window
        assert most[0] <= min(window, total) + 3  # the one being handed out, and the one being read
        if window >= 10:
            assert (moved != 0).mean() > 0.75 and len(set(moved)) > min(window, total) / 3
    # each row has a pick of its own, another one in every epoch
    first, second = (load(f"{folder}/*.tar", 1, state, batch_size=77)[0] for state in (None, found_state(folder)))
    assert sorted(first["values"]) == sorted(second["values"])
    picks = [dict(zip(batch["values"], batch["picks"], strict=True)) for batch in (first, second)]
    assert len(set(picks[0].values())) > 70 and all(picks[0][value] != picks[1][value] for value in picks[0])


def found_state(folder: Path) -> dict:
    """The state after exactly one epoch."""
    return load(f"{folder}/*.tar", 1, batch_size=77)[-1]["state"]


# ---------------------------------------------------------------------------------------------------------------------
# going on


@pytest.mark.parametrize("window", [1, 10, 40, 200])
def test_any_state_goes_on_after_it(folder, window):
    whole = load(f"{folder}/*.tar", 45, shuffle_window=window, rank=1, world=2)  # five epochs and more
    for stop in (0, 1, 7, 8, 9, 10, 19, 30, 44):
        state = whole[stop]["state"]
        rest = load(f"{folder}/*.tar", 44 - stop, state, shuffle_window=window, rank=1, world=2)
        assert [b["values"] for b in rest] == [b["values"] for b in whole[stop + 1 :]]
        assert [b["picks"] for b in rest] == [b["picks"] for b in whole[stop + 1 :]]
        assert all(one["state"] == other["state"] for one, other in zip(rest, whole[stop + 1 :], strict=True))
    # batches of another size go on with the same samples
    rest = load(f"{folder}/*.tar", 9, whole[7]["state"], batch_size=7, shuffle_window=window, rank=1, world=2)
    assert values(rest) == values(whole[8:])[:63]


def test_workers_bring_the_same_and_go_on_in_any_number(folder):
    alone = load(f"{folder}/*.tar", 30)
    first = load(f"{folder}/*.tar", 17, num_workers=3, time_limit=30)
    rest = load(f"{folder}/*.tar", 13, first[-1]["state"], num_workers=1, time_limit=30)
    assert [batch["values"] for batch in first + rest] == [batch["values"] for batch in alone]
    assert os.getpid() not in {item["seen"][1] for batch in first for item in batch["items"]}


def test_little_is_read_again(folder, monkeypatch):
    """Resuming reads the span of the window, and what lies before it in its shard."""
    whole = load(f"{folder}/*.tar", 80, shuffle_window=15)
    opened = []

    class Counted:
        def __init__(self, file):
            self.file, self.count = file, 0
            opened.append(self)

        def read(self, size):
            data = self.file.read(size)
            self.count += len(data)
            return data

        def close(self):
            self.file.close()

    usual = remote._open
    monkeypatch.setattr(remote, "_open", lambda url, at: Counted(usual(url, at)))
    monkeypatch.setattr(remote, "BUFFER", 2048)
    size = (folder / "000.tar").stat().st_size / SAMPLES  # bytes of a sample, about
    for stop in range(79):
        opened.clear()
        load(f"{folder}/*.tar", 1, whole[stop]["state"], shuffle_window=15)
        # two windows, since at the end of an epoch one begins before the last is handed out
        assert sum(file.count for file in opened) / size <= 2 * 15 + SAMPLES + 4 + 2
    spans = []
    for batch in whole:
        waiting = batch["state"]["waiting"]
        at = [epoch * 77 + shard * SAMPLES + sample for epoch, shard, sample in [*waiting, batch["state"]["next"]]]
        spans.append(max(at) - min(at))
    assert np.median(spans) <= 15 and max(spans) <= 30


def test_the_state_of_another_stream_is_refused(folder):
    state = load(f"{folder}/*.tar", 3)[-1]["state"]
    for how, message in (
        ({"world": 2}, "the number of ranks was 1, now 2"),
        ({"seed": 4}, "the seed was 3, now 4"),
        ({"shuffle_shards": False}, "the setting of shuffle_shards was True, now False"),
    ):
        with pytest.raises(ConfigError, match=f"the data cannot be resumed: {message}"):
            load(f"{folder}/*.tar", 1, state, **how)
    with pytest.raises(ConfigError, match="the number of shards was 7, now 3"):
        load(f"{folder}/{{000..002}}.tar", 1, state)
    with pytest.raises(ConfigError, match="the checksum of the shards' names was"):
        load([f"{folder}/{{000..005}}.tar", f"{folder}/000.tar"], 1, state)
    with pytest.raises(ConfigError, match=r"the state is not of a stream of shards, as it has no names"):
        load(f"{folder}/*.tar", 1, {"epoch": 0, "batch": 3, "clips": 7, "seed": 3, "rows": 4})
    signed = [[f"{folder}/00{i}.tar?signature={which}" for i in range(3)] for which in "ab"]
    assert len({StreamLoader(urls, read, together, 2).state_dict()["names"] for urls in signed}) == 1


def check_a_kill(folder: Path, urls: str, seed: int, workers: tuple[int, int]) -> None:
    batches, before = 60, leftovers()
    make = f"StreamLoader({urls!r}, read, together, 4, seed=3, shuffle_window=10, num_workers=workers, time_limit=30)"
    killed_at, seen = kill_and_resume(folder, "test_stream", make, "values", batches, seed, workers)
    assert killed_at < batches
    assert seen == [batch["values"] for batch in load(urls, batches)]
    assert leftovers() == before


def test_after_a_kill_the_stream_goes_on_where_it_was(folder, tmp_path, s3):
    """From an S3 server, in the third epoch, with another number of workers."""
    check_a_kill(tmp_path, "s3://corpus/train/*.tar", 1, workers=(2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_after_twenty_kills_the_stream_goes_on_where_it_was(folder, tmp_path, trial):
    check_a_kill(tmp_path, f"{folder}/*.tar", trial, workers=(2, 2 if trial % 2 else 3))


# ---------------------------------------------------------------------------------------------------------------------
# what fails


def test_a_torn_shard_costs_only_what_it_lost(folder, tmp_path):
    """Wherever it is cut, also at the end of a file, where a tar reader notices nothing."""
    whole = (folder / "000.tar").read_bytes()
    with tarfile.open(folder / "000.tar") as tar:
        ends = [m.offset_data + m.size for m in tar if m.name.endswith(".wav")]
    assert len(ends) == SAMPLES
    path = tmp_path / "torn.tar"
    for cut in [*range(0, ends[-1] + 512, 512), *range(100, ends[-1], 997), *ends]:
        path.write_bytes(whole[:cut])
        found = list(read_shard(str(path)))
        assert [s.name for s in found[:-1]] == [f"{path}#0-{i:02d}" for i, end in enumerate(ends) if end <= cut], cut
        assert found[-1] == {"id": str(path), "error": f"{path}: the tar ends early, after {cut:,} bytes"} or (
            cut and "end" in found[-1]["error"]
        )
    assert all(isinstance(sample, remote.Sample) for sample in read_shard(str(folder / "000.tar")))


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(folder, tmp_path):
    content = bytearray((folder / "000.tar").read_bytes())
    with tarfile.open(folder / "000.tar") as tar:
        begin = tar.getmember("0-04.json").offset
    content[begin : begin + 512] = np.random.default_rng(0).bytes(512)
    (tmp_path / "bad.tar").write_bytes(content)
    found = list(read_shard(str(tmp_path / "bad.tar")))
    assert [s.name[-4:] for s in found[:-1]] == ["0-00", "0-01", "0-02", "0-03"]
    assert "bad.tar: the tar is damaged" in found[-1]["error"]


def test_shards_that_fail_are_told_of_and_the_stream_goes_on(folder, tmp_path):
    urls = [f"{folder}/{{000..002}}.tar", f"{tmp_path}/no.tar", f"{tmp_path}/torn.tar", f"pipe:false {tmp_path}"]
    (tmp_path / "torn.tar").write_bytes((folder / "003.tar").read_bytes()[:-20_000])
    (tmp_path / "page.tar").write_text("<html>moved</html>" * 100)
    urls.append(str(tmp_path / "page.tar"))
    found = load(urls, 60)
    reasons = {item["id"]: item["error"] for batch in found for item in batch["bad"]}
    assert reasons.keys() == {*map(str, urls[1:])}
    assert reasons[urls[1]] == f"{urls[1]}: no such shard"
    assert "the tar ends early, after" in reasons[urls[2]] or "unexpected end" in reasons[urls[2]]
    assert reasons[urls[3]] == f"{urls[3]}: the command ended with exit status 1"
    assert all(len(batch["values"]) == 4 for batch in found)
    there = [s.name.split("#")[1] for s in read_shard(urls[2]) if isinstance(s, remote.Sample)]
    assert 0 < len(there) < SAMPLES
    epoch = 3 * SAMPLES + len(there)
    assert sorted(values(found)[:epoch]) == sorted(in_order([f"{folder}/00{i}.tar" for i in range(3)]) + there)
    for stop in (3, 11, 20, 33):
        rest = load(urls, 59 - stop, found[stop]["state"])
        assert values(rest) == values(found[stop + 1 :])


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_whose_only_shard_is_torn_goes_on_with_its_next_epoch(folder, tmp_path, world):
    """With as many shards as ranks, in every epoch one rank has only the torn one."""
    whole = [f"{folder}/00{number}.tar" for number in range(world - 1)]
    (tmp_path / "torn.tar").write_bytes((folder / "003.tar").read_bytes()[:700])
    urls = [*whole, str(tmp_path / "torn.tar")]
    for rank in range(world):
        found = load(urls, 12 * SAMPLES, batch_size=1, rank=rank, world=world)
        assert set(values(found)) == set(in_order(whole))  # everything that can be read
        assert {item["id"] for batch in found for item in batch["bad"]} == {urls[-1]}
        for stop in (SAMPLES // 2, SAMPLES, 3 * SAMPLES):
            rest = load(urls, 2 * SAMPLES, found[stop]["state"], batch_size=1, rank=rank, world=world)
            assert values(rest) == values(found[stop + 1 :])[: 2 * SAMPLES]
    (tmp_path / "torn too.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match="none of the 2 shards of rank 1 gave a sample: .*torn"):
        load(f"{tmp_path}/*.tar", 1, rank=1, world=2)


def test_no_shard_at_all_ends_with_the_first_reason(folder, tmp_path):
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    with pytest.raises(ConfigError, match=r"none of the 2 shards of rank 0 gave a sample: /nowhere/0.tar: no such sha"):
        load("/nowhere/{0,1}.tar", 1, shuffle_shards=False)
    for workers in (0, 1):
        with pytest.raises(ConfigError, match="none of the 1 shards of rank 0 gave a sample: they are empty"):
            load(f"{tmp_path}/empty.tar", 1, num_workers=workers)
    with pytest.raises(ConfigError, match=r"/nowhere/\*.tar: no such shards"):
        load("/nowhere/*.tar", 1)
    with pytest.raises(
        ConfigError, match="7 shards are too few for 8 ranks, as each needs one of its own: pack smaller shards"
    ):
        load(f"{folder}/*.tar", 1, world=8)
    with pytest.raises(ConfigError, match="the braces do not match; write a range as {000..127}"):
        shard_urls("s3://b/{000..127.tar")
    with pytest.raises(ConfigError, match=r"Protocol not known: nosuch"):
        load("nosuch://x.tar", 1)


def test_without_credentials_the_remedy_is_named(monkeypatch, tmp_path):
    import fsspec

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ConfigError, match=r"s3://b/x.tar: no credentials; set AWS_ACCESS_KEY_ID"):
        load("s3://b/x.tar", 1)


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_a_network_that_fails_now_and_then_costs_nothing(folder, serve, monkeypatch, parts):
    """Two of three answers are errors or break off midway; no sample is lost or comes twice."""
    answers = Counter()

    class Failing(Quiet):
        def do_GET(self):
            answers[self.path] += 1
            content = (folder / self.path[1:]).read_bytes()
            asked = self.headers.get("Range")
            if answers[self.path] % 3 == 1:
                self.send_error(503)
                return
            first, last = 0, len(content) - 1
            if parts and asked:
                first = int(asked.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            body = content[first : last + 1]
            # breaks off, each time a little later
            self.wfile.write(body[: 7_000 * answers[self.path]] if answers[self.path] % 3 == 2 else body)

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str((folder / self.path[1:]).stat().st_size))
            self.send_header("Accept-Ranges", "bytes" if parts else "none")
            self.end_headers()

    http = serve(Failing)
    found = load(f"{http}/{{000..002}}.tar", 9, batch_size=11, shuffle_shards=False, shuffle_window=1)
    assert values(found) == 3 * in_order([f"{folder}/00{i}.tar" for i in range(3)])
    assert not any(batch["bad"] for batch in found)
    assert min(answers.values()) > 6  # it did fail


def test_closing_does_not_wait_for_a_server(folder, serve, monkeypatch):
    """Neither while reading waits for its next attempt, nor while it fills a window."""

    class Broken(Quiet):
        def do_GET(self):
            self.send_error(500)

        do_HEAD = do_GET

    monkeypatch.setattr(remote, "PAUSES", (1000.0,))
    for urls in (f"{serve(Broken)}/{{000..003}}.tar", f"{folder}/*.tar"):
        how = dict(num_workers=1, shuffle_window=10**9)  # no epoch fills the window, so reading never ends
        loader = StreamLoader(urls, read, together, 10**6, **how)
        threading.Timer(1.0, loader.close).start()
        started = time.monotonic()
        with pytest.raises(ConfigError, match="tar: reading stopped, because the loader is closed"):
            next(iter(loader))
        assert time.monotonic() - started < 60


def test_a_server_that_stays_silent_is_given_up_after_growing_pauses(folder, serve, monkeypatch):
    class Broken(Quiet):
        def do_GET(self):
            if "001" in self.path:
                self.send_error(500)
            elif "002" in self.path:
                self.send_error(404)
            else:
                super().do_GET()

        do_HEAD = do_GET

    waited = []

    class Stop(threading.Event):
        def wait(self, pause):
            waited.append(pause)
            return False

    http = serve(Broken)
    [error] = list(read_shard(f"{http}/001.tar", stop=Stop()))
    assert waited == list(remote.PAUSES) and sorted(waited) == waited and len(set(waited)) == len(waited)
    assert error["id"] == f"{http}/001.tar" and "500" in error["error"] and "\n" not in error["error"]
    waited.clear()
    [error] = list(read_shard(f"{http}/002.tar", stop=Stop()))
    assert not waited and error["error"] == f"{http}/002.tar: no such shard"
    found = load(f"{http}/{{000..003}}.tar", 12)
    assert {item["id"][-7:] for batch in found for item in batch["bad"]} == {"001.tar", "002.tar"}
    assert {value[0] for value in values(found)} == {"0", "3"}


def test_samples_that_are_none_are_named_and_take_no_row(tmp_path):
    from webdataset import TarWriter

    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for key, content in {
            "good": {"wav": b"good", "json": {"caption": "x"}},
            "json": {"wav": b"1", "json": b"{no"},
            "deep": {"wav": b"1", "json": b"[" * 100_000},
            "half": {"wav": b"1", "json": b'{"id": "\\ud800", "caption": "x"}'},
            "alone": {"wav": b"1"},
            "silent": {"json": {"caption": "x"}},
            "number": {"wav": b"1", "json": {"caption": 5}},
            "backwards": {"wav": b"1", "json": {"caption": "x", "start": 3, "end": 2}},
            "list": {"wav": b"list", "json": {"id": 7, "caption": ["x", " "], "path": {"not": "ours"}}},
            "odd": {"wav": b"odd", "json": {"caption": ["x", "\ud800"], "split": 3, "problem": 5, "lacks": []}},
        }.items():
            writer.write({"__key__": key} | content)
    url = str(tmp_path / "a.tar")
    with tarfile.open(url, "a") as tar:  # a name that stands twice
        for content in (b"twice", b"again"):
            member = tarfile.TarInfo("twice.wav")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = load(url, 2, batch_size=3, shuffle_window=1)
    assert [batch["values"] for batch in found] == 2 * [["good", "list", "odd"]]
    assert next(s for s in read_shard(url) if isinstance(s, remote.Sample) and s.id == "a/odd").clip == Clip(
        "a/odd", "wav", captions={None: ["x"]}, split="3", problem="the caption is not UTF-8"
    )
    reasons = {item["id"]: item["error"] for batch in found for item in batch["bad"]}
    names = ("json", "deep", "half", "alone", "silent", "number", "backwards", "twice")
    assert reasons.keys() == {url, *(f"{url}#{name}" for name in names)}
    assert all(reason.startswith(name) and "\n" not in reason for name, reason in reasons.items())
    assert "its .json is not used: not a JSON object" in reasons[f"{url}#json"]
    assert "nothing to pair" in reasons[f"{url}#alone"]
    assert "nested too deeply" in reasons[f"{url}#deep"] and "is not UTF-8" in reasons[f"{url}#half"]
    assert "neither audio nor video" in reasons[f"{url}#silent"] and "end=2" in reasons[f"{url}#backwards"]
    assert 'no text under "caption"' in reasons[f"{url}#number"] and "duplicate" in reasons[url]


def test_a_sample_that_hangs_or_kills_its_worker_costs_only_itself(tmp_path):
    from webdataset import TarWriter

    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(20):
            what = {3: b"hang", 8: b"crash", 9: b"crash", 15: b"bad"}.get(number, f"{number}".encode())
            writer.write({"__key__": f"{number}", "wav": what + b"." * 5_000_000, "json": {"caption": "x"}})
    before = leftovers()
    [batch] = load(f"{tmp_path}/a.tar", 1, batch_size=20, num_workers=2, time_limit=2.0, shuffle_window=1)
    assert batch["values"] == [str(number) for number in range(20) if number not in (3, 8, 9, 15)]
    assert {item["id"]: item["error"] for item in batch["bad"]} == {
        "a/3": f"{tmp_path}/a.tar#3: reading it took more than 2 s",
        "a/8": f"{tmp_path}/a.tar#8: reading it ended the process (-11)",
        "a/9": f"{tmp_path}/a.tar#9: reading it ended the process (-11)",
        "a/15": f"{tmp_path}/a.tar#15: is bad",
    }
    assert leftovers() == before


# ---------------------------------------------------------------------------------------------------------------------
# media


def test_media_in_a_stream_are_what_the_files_are(tmp_path):
    """Every kind of file, decoded by a worker from memory, against the same file decoded from disk."""
    from webdataset import TarWriter

    processor = Processor(make_config(max_tokens=16, num_frames=2), make_tokenizer())
    chance = np.random.default_rng(0)
    sound = chance.uniform(-0.3, 0.3, (1, 48_000)).astype(np.float32)
    files = {}
    for ending in ("mp4", "mkv", "mov"):
        files[f"clip.{ending}"] = write_clip(tmp_path / f"clip.{ending}")
    files["silent.mp4"] = write_clip(tmp_path / "silent.mp4", sound=False)
    files["wave.wav"] = write_wav(tmp_path / "wave.wav", (sound * 2**15).astype(np.int16))
    for ending, codec in dict(
        flac="flac", ogg="libopus", opus="libopus", m4a="aac", aac="aac", mp3="libmp3lame"
    ).items():
        samples = (sound * 2**15).astype(np.int16) if codec == "flac" else sound
        form = "s16p" if codec == "flac" else "fltp"
        files[f"x.{ending}"] = write_audio(tmp_path / f"x.{ending}", samples, codec, form, "mono")
    files["torn.mp4"] = tmp_path / "torn.mp4"
    files["torn.mp4"].write_bytes(files["clip.mp4"].read_bytes()[:2000])
    shard = str(tmp_path / "a.tar")
    with TarWriter(shard) as writer:
        for number, (name, path) in enumerate(files.items()):
            ending = name.partition(".")[2]
            writer.write({"__key__": f"{number}", ending: path.read_bytes(), "json": {"caption": "a dog", "end": 0.7}})
        both = {"video.mp4": files["clip.mp4"].read_bytes(), "audio.wav": files["wave.wav"].read_bytes()}
        writer.write({"__key__": "both", "txt": "a bell"} | both)
    reader = ClipReader(processor, 30.0)
    loader = StreamLoader(
        shard, reader, lambda items, picks: {"items": items, "bad": []}, len(files) + 1, num_workers=1, time_limit=60,
        shuffle_window=1,
    )  # fmt: skip
    iterator = iter(loader)
    items = next(iterator)["items"]
    iterator.close()
    loader.close()
    for item, (name, path) in zip(items, files.items(), strict=False):
        pictured = name.endswith(("mp4", "mkv", "mov"))
        heard = None if name == "silent.mp4" else str(path)
        ours = reader(Clip(item["id"], heard, str(path) if pictured else None, {None: ["a dog"]}, end=0.7))
        if name == "torn.mp4":
            assert item["error"] == ours["error"].replace(str(path), f"{shard}#{item['id'][2:]}")
            continue
        assert item.keys() == ours.keys() and "error" not in item, name
        for part in {"waveform", "frames"} & ours.keys():
            assert torch.equal(item[part], ours[part]), name
    ours = reader(Clip("a/both", str(files["wave.wav"]), str(files["clip.mp4"]), {None: ["a bell"]}))
    assert all(torch.equal(items[-1][part], ours[part]) for part in ("waveform", "frames"))
    batch = Collate(processor)(items)
    assert len(batch["ids"]) == len(files) and batch["texts"][None]["input_ids"].shape[0] == len(files)
