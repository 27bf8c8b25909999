"""Checks of single settings, used in `__post_init__`, and how settings are shown."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from textwrap import indent
from typing import Any

import yaml


class ConfigError(ValueError):
    """A setting, or something that a setting names, cannot be used. The message is for the user: what is wrong, where,
    and what to do."""


def nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of a message about an unknown word: the known one that it resembles, or all known ones.

    Args:
        prefix: put before the word that is suggested.
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(known)}"


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raise `ConfigError` if the value of the setting `name` is not among the known ones."""
    require(value in known, f"{name}={value} is unknown{nearest(str(value), known)}")


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with the message if the condition does not hold."""
    if not condition:
        raise ConfigError(message)


def as_yaml(settings: Any) -> str:
    """The repr of settings: the class, and the YAML that they can be read from."""
    values = yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return f"{type(settings).__name__}:\n{indent(values.rstrip(), '  ')}"
