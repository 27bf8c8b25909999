"""Checkpoints from and to the Hugging Face hub, against a server on this machine that speaks to its library."""

import base64
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import randomize
from torch import Tensor

from pe_av import PEAudioVideo, Processor, load_model, save_model
from pe_av.checkpoint import CheckpointError
from pe_av.config.compose import load_preset
from pe_av.conversion.write_checkpoint import convert
from pe_av.hub import run_of
from pe_av.media.tokenizer import train_tokenizer

pytest.importorskip("huggingface_hub")


class Hub(ThreadingHTTPServer):
    """What `snapshot_download`, `create_repo` and `upload_folder` ask of the hub."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refusal: str | None = None  # the hub's error code for everything
        self.requests = 0


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if not self._accepted():
            return
        if parts[:2] == ["api", "models"]:
            files = self.server.repositories.get("/".join(parts[2:4]))
            if files is None:
                self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            elif parts[-1] == "gone":
                self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
            elif "tree" in parts:
                self._answer(
                    200, [{"type": "file", "path": p, "size": len(c), "oid": "c" * 40} for p, c in files.items()]
                )
            else:
                self._answer(200, {"id": "/".join(parts[2:4]), "sha": "a" * 40})
        else:  # user/name/resolve/revision/file
            content = self.server.repositories["/".join(parts[:2])][parts[4]]
            self._answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "a" * 40})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._accepted():
            return
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4])
        if parts[1] == "repos":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self._answer(200, {"url": f"https://huggingface.co/{name}", "id": name})
        elif parts[1] == "validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            regular = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._answer(200, {"files": regular})
        elif parts[4] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[name][line["value"]["path"]] = content
            self._answer(
                200, {"commitUrl": f"https://huggingface.co/{name}/commit/b", "commitOid": "b" * 40, "success": True}
            )

    def _entry(self, path: str, content: bytes) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(content), "oid": "c" * 40}

    def _accepted(self) -> bool:
        self.server.requests += 1
        if self.server.refusal is not None:
            self._answer(401 if self.server.refusal else 403, {}, {"X-Error-Code": self.server.refusal})
        return self.server.refusal is None

    def _answer(self, status: int, content: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("PE_AV_CACHE", str(tmp_path / "cache"))
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", address)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def model() -> PEAudioVideo:
    config = load_preset("tiny")
    config.text.vocab_size = 300
    return randomize(PEAudioVideo(config)).eval()


@pytest.fixture(scope="module")
def published(model: PEAudioVideo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a checkpoint as transformers has it."""
    folder = tmp_path_factory.mktemp("published")
    save_model(model, folder / "native")
    Processor(model.config, train_tokenizer(["a dog"], 300)).save_pretrained(folder / "native")
    convert(folder / "native", folder / "hf", "hf")
    return {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_published_checkpoint_is_converted_once(
    hub: Hub, model: PEAudioVideo, published: dict[str, bytes], tmp_path: Path
):
    hub.repositories["facebook/pe-av-tiny"] = published | {"model.bin": b"a pickle", "notes.txt": b"nothing"}
    found = load_model("hf:facebook/pe-av-tiny", dtype=torch.float64)
    assert same(found.state_dict(), model.double().state_dict())
    model.float()
    load_model("hf:facebook/pe-av-tiny@refs/pr/1")
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert kept == ["facebook--pe-av-tiny", "facebook--pe-av-tiny@refs--pr--1"]
    asked = hub.requests
    hub.shutdown()
    again = load_model("hf:facebook/pe-av-tiny", towers=("text",))
    batch = Processor.from_pretrained("hf:facebook/pe-av-tiny")(text="a dog")
    assert hub.requests == asked
    with torch.no_grad():
        found, expected = (m.get_text_audio_embeds(**batch) for m in (again, model))
    assert torch.equal(found, expected)
    assert not list((tmp_path / "theirs").rglob("*.bin")) and not list((tmp_path / "theirs").rglob("*.txt"))


@pytest.mark.parametrize(
    ("name", "refusal", "message"),
    [
        (
            "facebook/nothing",
            None,
            "no such repository, or it is private: check the name, or log in with hf",
        ),
        ("facebook/x", "GatedRepo", "its owner grants access on its page on the hub: ask there, and log in"),
        ("facebook/x@gone", None, "the repository has no such revision: leave @revision out"),
        ("pe-av-large", None, "a name on the hub is like hf:facebook/pe-av-large"),
    ],
)
def test_why_it_cannot_be_downloaded(hub: Hub, tmp_path: Path, name: str, refusal: str | None, message: str):
    hub.repositories["facebook/x"], hub.refusal = {}, refusal
    for load in (load_model, Processor.from_pretrained):
        with pytest.raises(CheckpointError, match=message) as caught:
            load(f"hf:{name}")
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_without_a_network_and_without_the_library(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.shutdown()
    hub.server_close()  # nobody listens there any more
    with pytest.raises(CheckpointError, match="the hub cannot be reached: check name and network") as caught:
        load_model("hf:facebook/x")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it raises
    with pytest.raises(CheckpointError, match=r"first pip install 'pe-av\[hub\]'"):
        load_model("hf:facebook/x")


# ---------------------------------------------------------------------------------------------------------------------
# uploading


@pytest.fixture
def run(model: PEAudioVideo, tmp_path: Path) -> Path:
    """The folder of a run, as the trainer leaves it."""
    folder = tmp_path / "run"
    save_model(model, folder / "checkpoint")
    Processor(model.config, train_tokenizer(["a dog"], 300)).save_pretrained(folder / "checkpoint")
    settings = {
        "seed": 3,
        "steps": 40,
        "optim": {"lr": 0.001},
        "model": {"output_dim": 128},
        "data": {"train": "/home/someone/train.jsonl", "eval": "/home/someone/eval.jsonl", "shards": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    recall = {"R@1": 12.34, "R@5": 50.0, "R@10": 75.0, "MedR": 4.5, "queries": 48, "gallery": 47}
    (folder / "metrics.json").write_text(json.dumps({"text->audio": recall, "held_out_loss": 1.25, "step": 40}))
    return folder


def test_what_is_uploaded_can_be_loaded(hub: Hub, model: PEAudioVideo, run: Path):
    (run / "checkpoint" / "notes.txt").write_text("mine")
    save_model(model, run / "checkpoint", push_to="someone/pe-av-mine")
    files = hub.repositories["someone/pe-av-mine"]
    assert sorted(files) == ["README.md", "config.yaml", "model.safetensors", "tokenizer.json"]
    assert same(load_model("hf:someone/pe-av-mine").state_dict(), model.state_dict())
    assert Processor.from_pretrained("hf:someone/pe-av-mine")(text="a dog")["input_ids"].shape[0] == 1


def test_the_card_says_what_the_run_recorded(hub: Hub, model: PEAudioVideo, run: Path):
    save_model(model, run / "checkpoint", push_to="someone/pe-av-mine")
    card = hub.repositories["someone/pe-av-mine"]["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "pe-av"
    assert f"({sum(p.numel() for p in model.parameters()):,} parameters; text, audio, video, fusion)" in card
    assert "after 40 steps" in card and "| text->audio | 12.3 | 50.0 | 75.0 | 4.5 | 48 | 47 |" in card
    assert "- held_out_loss: 1.25" in card
    data, settings = (yaml.safe_load(block.split("```")[0]) for block in card.split("```yaml\n")[1:])
    assert data == {"train": "train.jsonl", "eval": "eval.jsonl"}  # not where they lie on this machine
    assert settings == {"seed": 3, "steps": 40, "optim": {"lr": 0.001}}
    assert 'load_model("hf:someone/pe-av-mine")' in card


def test_the_card_claims_nothing_that_is_not_of_these_weights(hub: Hub, model: PEAudioVideo, run: Path):
    """Other weights, an evaluation that is older than the weights, or no run at all."""
    os.utime(run / "metrics.json", (0, 0))
    save_model(model, run / "checkpoint", push_to="someone/interrupted")
    card = hub.repositories["someone/interrupted"]["README.md"].decode()
    assert "were not evaluated by the run" in card and "12.3" not in card and "seed: 3" in card

    other = randomize(PEAudioVideo(model.config), seed=1).eval()
    assert run_of(run / "checkpoint", other) is None
    save_model(other, run / "checkpoint", push_to="someone/other")
    files = hub.repositories["someone/other"]
    assert "Nothing was recorded" in files["README.md"].decode() and "seed" not in files["README.md"].decode()
    assert same(load_model("hf:someone/other").state_dict(), other.state_dict())
    save_model(model, run / "alone" / "x", push_to="someone/alone")
    card = hub.repositories["someone/alone"]["README.md"].decode()
    assert "Nothing was recorded" in card and "There is no tokenizer here" in card


def test_an_upload_without_a_login(hub: Hub, model: PEAudioVideo, tmp_path: Path):
    hub.refusal = ""
    with pytest.raises(CheckpointError, match="is saved, but could not be uploaded to someone/x: .*hf auth login"):
        save_model(model, tmp_path / "x", push_to="someone/x")
    assert same(load_model(tmp_path / "x").state_dict(), model.state_dict())
