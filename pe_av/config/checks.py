"""What the settings check themselves with."""

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key and the remedy."""


def nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(known)}"


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    require(value in known, f"{name}={value} is unknown{nearest(str(value), known)}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
