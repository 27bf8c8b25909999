"""From YAML files and the command line to the settings of `config.py`, and the frame of every command.

A misspelt key or a wrong type fails here, with the nearest right name, before anything is built. Nothing here imports
torch.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pe_av.config import ARCHITECTURES, ConfigError, ModelConfig, PEAudioFrameConfig, nearest, one_of


def config_dir() -> Path:
    """Folder of the YAML files: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def from_dict(schema: type, values: dict[str, Any], source: str) -> Any:
    """`values` checked against the dataclass `schema` and turned into it.

    Args:
        source: what to call the origin of the values in an error, e.g. the file's path.
    Raises:
        ConfigError: unknown key (the nearest right one is named), wrong type or impossible value.
    """
    merged = _merge(schema, values, source)
    try:
        return OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{source}: {error.full_key} is not set: give {error.full_key}=…") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def read_yaml(schema: type, path: Path) -> Any:
    """The YAML file at `path` as the dataclass `schema`."""
    return from_dict(schema, _read_mapping(path), source=str(path))


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not a mapping of settings")
    return values


def read_model_config(path: Path) -> ModelConfig | PEAudioFrameConfig:
    """The `config.yaml` of a native checkpoint; which model it is of stands under `architecture`."""
    values = _read_mapping(path)
    architecture = values.pop("architecture", None)
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{path}: architecture={architecture} is none of {', '.join(ARCHITECTURES)}")
    return from_dict(ARCHITECTURES[architecture], values, source=str(path))


def model_config_yaml(config: ModelConfig | PEAudioFrameConfig) -> str:
    """What `read_model_config` reads."""
    architecture = next(name for name, schema in ARCHITECTURES.items() if type(config) is schema)
    return yaml.safe_dump({"architecture": architecture} | asdict(config), sort_keys=False)


def model_presets() -> list[str]:
    return sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))


def load_preset(name: str) -> ModelConfig:
    """The model of `configs/model/<name>.yaml`, with what that file builds on."""
    from hydra import compose, initialize_config_dir  # half a second that `import pe_av` need not wait for

    one_of("model", name, model_presets())
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose(f"model/{name}")
    return from_dict(ModelConfig, OmegaConf.to_container(composed.model), source=f"configs/model/{name}.yaml")


def check_overrides(schema: type, arguments: Sequence[str]) -> None:
    """Refuse a misspelt `key=value` on the command line, naming the nearest right key or group member.

    Raises:
        ConfigError: for the first argument that names no setting of `schema` and no file of a config group.
    """
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-") or key.split(".")[0] == "hydra":
            continue
        key = key.lstrip("+~")
        group = config_dir() / key.split("@")[0]
        if group.is_dir():
            if "," not in value:  # a sweep is Hydra's to check
                one_of(key, value, sorted(path.stem for path in group.glob("*.yaml")))
        else:
            nested = _nested(key, _value(argument, value))
            _check_keys(schema, nested, source="command line", prefix="")
            if "," not in value or value[0] in "[{":  # the values of a sweep are Hydra's to check
                _merge(schema, nested, source="command line")


def run_command(schema: type, config_name: str, run: Callable[[Any, Path], object]) -> None:
    """A command of `key=value` arguments, from reading them to its exit code.

    Args:
        schema: what the settings are checked against.
        config_name: of the YAML under `configs/` that they are merged into.
        run: is given the settings and the folder that the command writes to. What it raises for the user to read,
            `ValueError` and `OSError`, ends in one line and exit code 1.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig

    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)

    @hydra.main(config_path=str(config_dir()), config_name=config_name, version_base="1.3")
    def main(composed: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            run(from_dict(schema, OmegaConf.to_container(composed), source="config"), folder)
        except (ValueError, OSError) as error:
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            sys.exit(f"error: {f'{folder}: ' if full else ''}{error}")
        except KeyboardInterrupt:
            sys.exit(130)

    try:
        check_overrides(schema, sys.argv[1:])
    except ValueError as error:  # a ConfigError, or a value that YAML reads as an impossible date
        sys.exit(f"error: {error}")
    sys.argv[1:] = _with_named_sections(schema, sys.argv[1:])
    if os.environ.get("RANK", "0") != "0" and not any(one.startswith("hydra.run.dir=") for one in sys.argv):
        sys.argv.append("hydra.run.dir=.")  # rank 0's folder is that of all; another second would name another one
    main()


def _value(argument: str, text: str) -> Any:
    """Of an override; where it has brackets, as Hydra reads it, which is not quite YAML."""
    if text[:1] not in "[{" or not text:
        return yaml.safe_load(text)
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        return OverridesParser.create().parse_override(argument).value()
    except OverrideParseException as error:
        raise ConfigError(f"command line: {argument}: {str(error).splitlines()[0]}") from None


def _with_named_sections(schema: type, arguments: Sequence[str]) -> list[str]:
    """The overrides as Hydra takes them: it knows no key whose name is the user's to choose, such as that of a data set
    in data.mix, so all below such a mapping become one override of the whole, `++data.mix={name:{…}}`."""
    kept, named = [], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.lstrip("+")
        mapping = _mapping_above(schema, key) if equals else None
        if mapping is None:
            kept.append(argument)
            continue
        if mapping == key:  # all of it at once
            kept.append(f"++{key}={value}")
            continue
        *path, last = key.removeprefix(f"{mapping}.").split(".")
        inner = named.setdefault(mapping, {})
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return kept + [f"++{mapping}={_literal(inner)}" for mapping, inner in named.items()]


def _mapping_above(schema: type, key: str) -> str | None:
    """The part of a dotted key, or all of it, that is a mapping from names to values."""
    parts = key.split(".")
    for count, part in enumerate(parts, start=1):
        types = get_type_hints(schema) if is_dataclass(schema) else {}
        if part not in types:
            return None
        if get_origin(types[part]) is dict:
            return ".".join(parts[:count])
        schema = next((t for t in (types[part], *get_args(types[part])) if is_dataclass(t)), type(None))
    return None


def _literal(value: Any) -> str:
    """Of a mapping in Hydra's grammar; what is no mapping stands there as it was written."""
    if not isinstance(value, dict):
        return value
    return "{" + ",".join(f"{name}:{_literal(inner)}" for name, inner in value.items()) + "}"


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    head, _, rest = dotted.partition(".")
    return {head: _nested(rest, value) if rest else value}


def _merge(schema: type, values: dict[str, Any], source: str) -> DictConfig:
    _check_keys(schema, values, source, prefix="")
    try:
        return OmegaConf.merge(OmegaConf.structured(schema), values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from error


def _check_keys(schema: type, values: dict[str, Any], source: str, prefix: str) -> None:
    types = get_type_hints(schema)
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"{source}: unknown setting {prefix}{key}{nearest(str(key), types, prefix)}")
        inner = next((t for t in (types[key], *get_args(types[key])) if is_dataclass(t)), None)
        if inner is None or value is None:
            continue
        sections = {f"{prefix}{key}": value}
        if get_origin(types[key]) is list:
            if not isinstance(value, list):
                raise ConfigError(f"{source}: {prefix}{key} is a list of sections, not {value!r}")
            sections = {f"{prefix}{key}[{i}]": item for i, item in enumerate(value)}
        elif get_origin(types[key]) is dict:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {prefix}{key} names sections, and is not {value!r}")
            sections = {f"{prefix}{key}.{name}": item for name, item in value.items()}
        for name, section in sections.items():
            if not isinstance(section, dict):
                raise ConfigError(f"{source}: {name} is a section of settings, not {section!r}")
            _check_keys(inner, section, source, prefix=f"{name}.")
