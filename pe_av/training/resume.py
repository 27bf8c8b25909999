"""Which state a run goes on from, and whether its settings allow that."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from pe_av.checkpoint import CheckpointError
from pe_av.config import ConfigError
from pe_av.ranks import of_rank_0, rank
from pe_av.training.states import damage, named_states, newest_whole

# Settings that a state fixes: with other values, the resumed run would not be the same run. All others may be changed.
# Paths of clips are not listed, since files may move: the loader's state checks the clips' names.
FIXED_ON_RESUME = (
    "model", "seed", "batch_size", "accumulate", "lora", "optim.freeze", "loss.pairings", "data.max_seconds",
    "data.batch_tokens", "data.random_crop", "data.shuffle_window", "max_seconds",
)  # fmt: skip


def state_to_resume(states: Path, resume: str | None, console: Console) -> Path | None:
    """The state that the setting `resume` names; for "auto" the newest undamaged one in `states`, if there is any.

    Only rank 0 reads the disk.

    Raises:
        ConfigError: that state is damaged, or `states` has some and `resume` is not set.
    """
    state, problem = None, None
    if rank() == 0:
        if resume is None:
            if named_states(states):
                problem = f"{states} has states of an earlier run: continue it with resume=auto, or use another folder"
        elif resume == "auto":
            state, damaged = newest_whole(states)
            for path, reason in damaged:
                console.print(f"passed over {path}: {reason}", soft_wrap=True)
            if state is None:
                console.print(f"nothing to resume in {states}: starting at step 0", soft_wrap=True)
        elif reason := damage(Path(resume)):
            problem = f"{resume}: {reason}; resume from another state"
        else:
            state = Path(resume)
    state, problem = of_rank_0((state, problem))
    if problem is not None:
        raise ConfigError(problem)
    return state


def check_settings(state: Path, progress: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse a state whose run had other settings of what cannot change (`FIXED_ON_RESUME`).

    Raises:
        ConfigError: the settings that differ, with the old and the new value.
        CheckpointError: an earlier version of this code wrote the state.
    """
    if "items" not in progress:
        raise CheckpointError(
            f"{state}: an earlier version of this code wrote it, with other contents; start a new run from its model: "
            "checkpoint=…"
        )
    before, now = _flat(progress["settings"]), _flat(json.loads(json.dumps(settings)))
    fixed = [
        name
        for name in sorted(before.keys() | now.keys())
        if any(name == setting or name.startswith(f"{setting}.") for setting in FIXED_ON_RESUME)
        and before.get(name) != now.get(name)
    ]
    # these may get another value, but cannot be switched on or off: the state has an average or it has not, Muon and
    # AdamW keep other moments, and parts whose features are cached are frozen
    either_way = ("optim.ema", "optim.muon_lr", "data.cache")
    switched = [name for name in either_way if (before.get(name) is None) != (now.get(name) is None)]
    changed = [f"{name} was {before.get(name)}, now {now.get(name)}" for name in fixed + switched]
    if changed:
        raise ConfigError(
            f"{state}: cannot go on with other settings of what it fixes: {'; '.join(changed[:5])}. Set them back, or "
            "start a new run from its model: checkpoint=…"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}"""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
