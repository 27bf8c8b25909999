"""Damaged, partial and cut items: all are listed in the folder of the run, and too many damaged ones end it."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pe_av.config import ConfigError

FEWEST_JUDGED = 200  # the fraction of damaged items is taken of at least so many, where there are as many


class BadItems:
    """The lists `bad_items.jsonl`, `partial_items.jsonl` and `cut_items.jsonl`, and the limit on damaged items.

    A damaged item has something that cannot be read, such as a torn file. A partial item merely lacks something, such
    as the audio of a silent film. A cut item is longer than `max_seconds`. Every rank
    counts the items of all ranks, so that all of them stop at the same batch.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        max_fraction: float,
        writes: bool = True,
        state: Mapping[str, int] | None = None,
    ):
        """
        Args:
            folder: of the lists, whose lines are {"id", "error"}.
            total: number of items in the data.
            max_fraction: the fraction of the items read so far that may be damaged; beyond it, `add` raises.
            writes: whether this process writes the lists: one rank must.
            state: `state_dict()` of the run to resume; the lists are cut back to it. None: they start empty.
        """
        self.total, self.max_fraction, self.writes = total, max_fraction, writes
        state = {"seen": 0} if state is None else state
        self.seen = state["seen"]  # items read so far
        self.files = {name: folder / f"{name}_items.jsonl" for name in ("bad", "partial", "cut")}
        self.reasons = {name: _read_reasons(path, state.get(name, 0)) for name, path in self.files.items()}
        if writes:
            for name, path in self.files.items():
                if path.exists():
                    _write_reasons(path, self.reasons[name])

    def state_dict(self) -> dict[str, int]:
        """The number of items read, and the length of each list."""
        return {"seen": self.seen} | {name: len(reasons) for name, reasons in self.reasons.items()}

    def cut_line(self) -> str | None:
        """One line about the cut items, if there are any."""
        count, where = len(self.reasons["cut"]), self.files["cut"]
        return f"{count} clips are longer than max_seconds and were cut to it, as {where} lists" if count else None

    def add(
        self,
        read: int,
        bad: Iterable[dict[str, Any]] = (),
        partial: Iterable[dict[str, Any]] = (),
        cut: Iterable[dict[str, Any]] = (),
    ) -> None:
        """Count the items of another batch, and list those that are not on the lists yet.

        Args:
            read: number of items.
            bad, partial, cut: {"id", "error"} of the damaged, the partial and the cut ones.
        Raises:
            ConfigError: too many items are damaged.
        """
        self.seen = min(self.seen + read, self.total)
        new_bad = self._list("bad", bad)
        self._list("partial", partial)
        self._list("cut", cut)
        count = len(self.reasons["bad"])
        # one damaged item among the first few says nothing yet
        judged = max(self.seen, min(self.total, FEWEST_JUDGED))
        if new_bad and count > self.max_fraction * judged:
            raise ConfigError(
                f"{count} of {self.seen} items read are damaged, more than max_bad_fraction={self.max_fraction:g} "
                f"allows; the last: {new_bad[-1]}; all are listed in {self.files['bad']}"
            )

    def _list(self, name: str, items: Iterable[dict[str, Any]]) -> list[str]:
        """Append the items that are new to the list; returns their reasons."""
        new = {item["id"]: item["error"] for item in items if item["id"] not in self.reasons[name]}
        self.reasons[name] |= new
        if new and self.writes:
            with self.files[name].open("a", encoding="utf-8") as file:
                file.write(_lines(new))
        return list(new.values())


def _read_reasons(path: Path, count: int) -> dict[str, str]:
    """id -> error of the first `count` lines of a list; torn lines, as a full disk leaves them, are skipped."""
    reasons: dict[str, str] = {}
    if count and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                reasons[row["id"]] = row["error"]
            except (ValueError, TypeError, KeyError):
                continue
            if len(reasons) == count:
                break
    return reasons


def _write_reasons(path: Path, reasons: Mapping[str, str]) -> None:
    if not reasons:
        path.unlink()
        return
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(_lines(reasons), encoding="utf-8")
    os.replace(unfinished, path)


def _lines(reasons: Mapping[str, str]) -> str:
    return "".join(json.dumps({"id": key, "error": error}) + "\n" for key, error in reasons.items())
