"""Driving a loader: over several epochs, as several ranks that resume from one state, and through a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pe_av.loading.loader import Loader

TESTS = Path(__file__).parent


def take(loader: Loader, count: int, key: str) -> list[Any]:
    """`key` of the next batches; where an epoch ends, the next begins."""
    taken: list[Any] = []
    while len(taken) < count:
        for batch in loader:
            taken.append(batch[key])
            if len(taken) == count:
                break
    return taken


def take_on_ranks(
    make: Callable[[int, int], Loader], world: int, state: dict[str, Any], count: int, key: str
) -> tuple[list[Loader], list[list[Any]]]:
    """The loaders of all ranks after so many steps from `state`, and of each step the sorted rows of all ranks.

    Args:
        make: (rank, world size) -> loader.
    """
    ranks = [make(rank, world) for rank in range(world)]
    for loader in ranks:
        loader.load_state_dict(state)
    steps = zip(*[take(loader, count, key) for loader in ranks], strict=True)
    return ranks, [sorted(sum(step, [])) for step in steps]


RANK = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from {module} import *
if __name__ == "__main__":
    folder, rank, world, workers, batches = sys.argv[1], *map(int, sys.argv[2:])
    loader = {make}
    saved, log, done = f"{{folder}}/state{{rank}}.json", open(f"{{folder}}/log{{rank}}.jsonl", "a"), 0
    if os.path.exists(saved):
        done, state = json.load(open(saved))
        loader.load_state_dict(state)
    while done < batches:
        for batch in loader:
            done += 1
            print(json.dumps([done, batch[{key!r}]]), file=log, flush=True)
            with open(saved + ".part", "w") as file:  # a state after every step
                json.dump([done, loader.state_dict()], file)
            os.replace(saved + ".part", saved)
            if done >= batches:
                break
    os._exit(0)
"""


def kill_and_resume(
    folder: Path, module: str, make: str, key: str, batches: int, seed: int, workers: tuple[int, int], world: int = 1
) -> tuple[int, list[list[Any]]]:
    """Start ranks, kill them at a random step, and start them again.

    Args:
        module: the test module from which the ranks import what `make` needs.
        make: an expression with `rank`, `world` and `workers` that makes the loader.
        key: what is taken of each batch, a list.
        workers: before and after the kill.
    Returns:
        the steps of rank 0 before the kill, and for each step what all ranks have seen, one after the other.
    """
    script = folder / "rank.py"
    script.write_text(RANK.format(root=str(TESTS.parent), tests=str(TESTS), module=module, make=make, key=key))

    def start(workers: int) -> list[subprocess.Popen]:
        command = [sys.executable, str(script), str(folder)]
        return [subprocess.Popen([*command, *map(str, (rank, world, workers, batches))]) for rank in range(world)]

    ranks, log = start(workers[0]), folder / "log0.jsonl"
    stop, deadline = random.Random(seed).randrange(1, batches), time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= stop):
        time.sleep(0.001)
    for process in ranks:
        os.kill(process.pid, signal.SIGKILL)
    for process in ranks:
        process.wait()
    killed_at = log.read_text().count("\n")
    for process in start(workers[1]):
        assert process.wait(timeout=120) == 0
    seen: list[list[Any]] = [[] for _ in range(batches)]
    for rank in range(world):
        steps: dict[int, list[Any]] = {}
        for line in (folder / f"log{rank}.jsonl").read_text().splitlines():
            number, rows = json.loads(line)
            assert steps.setdefault(number, rows) == rows  # a step after which no state was written is repeated
        assert sorted(steps) == list(range(1, batches + 1))
        for number, rows in steps.items():
            seen[number - 1] += rows
    return killed_at, seen
