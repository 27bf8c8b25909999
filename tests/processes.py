"""Processes for the tests: commands as a user starts them, and the ranks of a run.

They are forked from a server that has imported torch and the package, so that starting one takes a tenth of a second
instead of the ten that importing takes on a busy machine.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
# what is imported once; the tests for the functions that their ranks run
PRELOADED = ["pe_av.training.contrastive", "pe_av.training.frame", "matplotlib.backends.backend_agg", "test_matrix"]
PRELOADED += ["test_corpus"]


def _fork(target: Callable, *arguments: Any) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


# ---------------------------------------------------------------------------------------------------------------------
# commands


class Command:
    """`python train.py key=value …` or, where the script is the name of a module, `python -m MODULE …`."""

    def __init__(self, output: Path, script: str, *arguments: str):
        """
        Args:
            output: folder for what it writes to its standard output and error.
        """
        output.mkdir(parents=True, exist_ok=True)
        name = f"{time.monotonic_ns()}"
        self.files = [output / f".{name}.{stream}" for stream in ("stdout", "stderr")]
        self.process = _fork(_run_script, script, arguments, *map(str, self.files))

    def wait(self, seconds: float = 300) -> "Command":
        """Until it has ended; sets `returncode`, `stdout` and `stderr`."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s: {self.files[1].read_text()}")
        self.returncode = self.process.exitcode
        self.stdout, self.stderr = (file.read_text() for file in self.files)
        for file in self.files:
            file.unlink()
        return self

    def is_running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


def _run_script(script: str, arguments: tuple[str, ...], stdout: str, stderr: str) -> None:
    for descriptor, path in ((1, stdout), (2, stderr)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


# ---------------------------------------------------------------------------------------------------------------------
# ranks


class Ranks:
    """The processes of one run, connected by gloo; they write into `folder/output-<rank>.txt`."""

    def __init__(self, ranks: int, config: Any, folder: Path, do: Callable[[dict[str, Any], Path], None]):
        """
        Args:
            do: what each rank does with the config, as a dict, and the folder; a function of a module.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [_fork(_rank, index, ranks, port, do, asdict(config), str(folder)) for index in range(ranks)]

    def finish(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        if codes != [0] * len(codes):
            self.kill()
            outputs = "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("output-*.txt")))
            raise AssertionError(f"exit codes {codes}\n{outputs}")

    def kill(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def _rank(
    index: int, ranks: int, port: int, do: Callable[[dict[str, Any], Path], None], config: dict[str, Any], folder: str
) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(index), "WORLD_SIZE": str(ranks)}
    with open(os.path.join(folder, f"output-{index}.txt"), "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    do(config, Path(folder))
