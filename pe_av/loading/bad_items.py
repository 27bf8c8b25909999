"""Items that are damaged or lack something: listed in the run's folder, and many damaged ones end the run."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pe_av.config import ConfigError


class BadItems:
    """Items that are damaged, and items that merely lack something: both are listed, and many damaged end the run.

    With several ranks all of them count the items of all, so that all stop at once; rank 0 writes the lists.
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
            folder: of `bad_items.jsonl` and `partial_items.jsonl`, lists of {"id", "error"}.
            total: items that there are.
            max_fraction: of the items seen, above which `add` raises.
            writes: whether this process writes the lists.
            state: `state_dict()` of the run that goes on, to which the lists are cut back; None: they begin anew.
        """
        self.total, self.max_fraction, self.writes = total, max_fraction, writes
        state = {"seen": 0, "bad": 0, "partial": 0} if state is None else state
        self.seen = state["seen"]  # items read so far
        self.files = {name: folder / f"{name}_items.jsonl" for name in ("bad", "partial")}
        self.reasons = {name: _reasons(path, state[name]) for name, path in self.files.items()}
        if writes:
            for name, path in self.files.items():
                if path.exists():
                    _write_reasons(path, self.reasons[name])

    def state_dict(self) -> dict[str, int]:
        """How much was seen, and how long the lists are."""
        return {"seen": self.seen} | {name: len(reasons) for name, reasons in self.reasons.items()}

    def add(self, read: int, bad: Iterable[dict[str, Any]] = (), partial: Iterable[dict[str, Any]] = ()) -> None:
        """
        Args:
            read: items read since the last time.
            bad, partial: {"id", "error"} of those that are damaged, and of those that lack something.
        Raises:
            ConfigError: too many are damaged.
        """
        self.seen = min(self.seen + read, self.total)
        last = ""
        for name, items in (("bad", bad), ("partial", partial)):
            new = {item["id"]: item["error"] for item in items if item["id"] not in self.reasons[name]}
            if not new:
                continue
            self.reasons[name] |= new
            last = next(reversed(new.values())) if name == "bad" else last
            if self.writes:
                with self.files[name].open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"id": key, "error": error}) + "\n" for key, error in new.items())
        count = len(self.reasons["bad"])
        # one bad item among the first few says nothing yet
        judged = max(self.seen, min(self.total, FEWEST_JUDGED))
        if last and count > self.max_fraction * judged:
            raise ConfigError(
                f"{count} of {self.seen} items read cannot be used, more than max_bad_fraction={self.max_fraction:g} "
                f"allows; the last: {last}; all are listed in {self.files['bad']}"
            )


FEWEST_JUDGED = 200  # items that `max_bad_fraction` is a fraction of, at least, if there are as many


def _reasons(path: Path, count: int) -> dict[str, str]:
    """The first `count` items of a list; a line that is torn, as on a full disk, is none."""
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
    lines = (json.dumps({"id": key, "error": error}) + "\n" for key, error in reasons.items())
    unfinished.write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, path)
