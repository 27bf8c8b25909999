"""What an installed package consists of: the wheel, its console command, and the files that state versions."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from processes import ROOT, Command

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_its_configs(wheel: Path):
    """Every file of both, the configs where `config_dir` finds them, and nothing else of the checkout."""
    with ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for name in ("pe_av", "configs") for path in (ROOT / name).rglob("*.*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".pyc", ".pyo")}
    assert found == {f"pe_av/{name}" if name.startswith("configs/") else name for name in names}


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train.py", ["--cfg", "job", "data=manifest", "model.output_dim=64"]),
        ("eval.py", ["datta=x"]),
        ("convert.py", ["target=b"]),  # without source=
    ],
)
def test_the_console_command_does_what_the_scripts_do(tmp_path: Path, script: str, arguments: list[str]):
    ours = Command(tmp_path / "ours", "pe_av.commands", script.removesuffix(".py"), *arguments)
    theirs = Command(tmp_path / "theirs", script, *arguments).wait()
    ours.wait()
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
    assert theirs.stdout or theirs.stderr


def test_a_misspelt_console_command_is_refused(tmp_path: Path):
    done = Command(tmp_path, "pe_av.commands", "trian").wait()
    assert (done.returncode, done.stderr) == (1, "error: pe-av has no command trian; did you mean train?\n")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The console command as pip installs it from the wheel, and an environment that finds this installation first."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    return site / "bin" / "pe-av", {**os.environ, "PYTHONPATH": str(site)}


@pytest.mark.slow
def test_an_installed_package_works_from_an_empty_folder(installed: tuple[Path, dict[str, str]], tmp_path: Path):
    command, environment = installed

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

    help_page = run()
    assert help_page.returncode == 0 and help_page.stdout.startswith("usage: pe-av COMMAND")
    settings = run("train", "--cfg", "job")
    assert yaml.safe_load(settings.stdout)["model"]["video"]["vision"]["image_size"] == 64, settings.stderr
    refused = run("train", "optim.lrr=1")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "error: command line: unknown setting optim.lrr; did you mean optim.lr?\n"
    assert not list(tmp_path.iterdir())

    # the codec has a quarter of its width
    narrow = "model.audio.codec.encoder_hidden_size=2"
    small = ["data.demo.train_clips=24", "data.demo.eval_clips=8", "batch_size=8", "data.num_workers=0", "device=cpu"]
    trained = run("train", "-m", "seed=0,1", "steps=2", narrow, *small, "hydra.sweep.dir=runs/sweep")
    assert trained.returncode == 0, trained.stderr
    for seed in "01":
        assert (tmp_path / "runs" / "sweep" / seed / "metrics.json").exists()
    checkpoint = "checkpoint=runs/sweep/0/checkpoint"
    evaluated = run("eval", checkpoint, *small, "hydra.run.dir=runs/eval")
    assert evaluated.returncode == 0, evaluated.stderr
    converted = run("convert", "source=runs/sweep/0/checkpoint", "target=hf", "to=hf")
    assert converted.returncode == 0, converted.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "data", "hf"}


def test_the_files_that_state_a_version_agree():
    changelog = re.findall(r"^## (\S+) – (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert changelog[0] == (PROJECT["version"], str(citation["date-released"]))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_tested_versions_are_allowed(python: str):
    """What constraints.txt pins for a version of Python is what pyproject.toml asks for."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment):
                assert pin.name not in pins, f"{pin.name} is pinned twice"
                pins[pin.name] = str(pin.specifier).removeprefix("==")
    extras = PROJECT["optional-dependencies"]
    optional = [line for name, lines in extras.items() if name != "dev" for line in lines]
    for line in [*PROJECT["dependencies"], *extras["dev"], *optional]:
        needed = Requirement(line)
        if needed.name != PROJECT["name"] and (needed.marker is None or needed.marker.evaluate(environment)):
            if needed.name not in pins:  # an extra that the tests need not
                assert line in optional, f"{needed.name} is not pinned: run the command at the top of constraints.txt"
                continue
            assert needed.specifier.contains(pins[needed.name]), f"{line}, but {needed.name}=={pins[needed.name]}"
