"""Reads settings from YAML files and the command line, and runs commands with them.

A misspelt key or a value of the wrong type fails here, before anything is built; the message names the nearest right
key. Nothing here imports torch.
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
    """The folder of the YAML files: beside the package in a checkout, inside the package if a wheel installed it."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def from_dict(schema: type, values: dict[str, Any], source: str) -> Any:
    """Check `values` against the dataclass `schema`, and make an instance of it.

    Args:
        source: where the values come from, e.g. the file's path; named in errors.
    Raises:
        ConfigError: a key is unknown (the message names the nearest right one), or a value is of the wrong type or
            impossible.
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
    """The settings in the YAML file at `path`, as an instance of the dataclass `schema`."""
    return from_dict(schema, _read_mapping(path), source=str(path))


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the file is a YAML {type(values).__name__}, not a mapping of settings")
    return values


def read_model_config(path: Path) -> ModelConfig | PEAudioFrameConfig:
    """The `config.yaml` of a native checkpoint, whose key `architecture` says which model it describes."""
    values = _read_mapping(path)
    architecture = values.pop("architecture", None)
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{path}: architecture={architecture} is none of {', '.join(ARCHITECTURES)}")
    return from_dict(ARCHITECTURES[architecture], values, source=str(path))


def model_config_yaml(config: ModelConfig | PEAudioFrameConfig) -> str:
    """The text of a `config.yaml` that `read_model_config` reads."""
    architecture = next(name for name, schema in ARCHITECTURES.items() if type(config) is schema)
    return yaml.safe_dump({"architecture": architecture} | asdict(config), sort_keys=False)


def model_presets() -> list[str]:
    """The names that `model=` and `load_preset` take."""
    return sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))


def load_preset(name: str) -> ModelConfig:
    """The model of `configs/model/<name>.yaml`, and of the files that this one builds on."""
    from hydra import compose, initialize_config_dir  # takes half a second, which `import pe_av` should not

    one_of("model", name, model_presets())
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose(f"model/{name}")
    return from_dict(ModelConfig, OmegaConf.to_container(composed.model), source=f"configs/model/{name}.yaml")


def compose_settings(schema: type, config_name: str, overrides: Sequence[str] = ()) -> Any:
    """The settings that a command would run with, for starting it from Python.

    Args:
        schema, config_name: as of `run_command`; `(TrainConfig, "train")` is `python train.py`.
        overrides: the command's arguments, such as "steps=100".
    Raises:
        ConfigError: an argument names no setting, or its value is impossible.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    check_overrides(schema, overrides)
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose(config_name, _with_named_sections(schema, overrides))
    return from_dict(schema, OmegaConf.to_container(composed), source="config")


def check_overrides(schema: type, arguments: Sequence[str]) -> None:
    """Refuse a misspelt `key=value` on the command line, naming the nearest right key or file of a config group.

    Raises:
        ConfigError: an argument names no setting of `schema` and no file of a group, or its value has the wrong type.
    """
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-") or key.split(".")[0] == "hydra":
            continue
        key = key.lstrip("+~")
        group = config_dir() / key.split("@")[0]
        if group.is_dir():
            for name in _listed(value) or ([] if "," in value else [value]):  # a sweep is left to Hydra
                one_of(key, name, sorted(path.stem for path in group.glob("*.yaml")))
        else:
            nested = _nested(key, _value(argument, value))
            _check_keys(schema, nested, source="command line", prefix="")
            if "," not in value or value[0] in "[{":  # the values of a sweep are left to Hydra
                _merge(schema, nested, source="command line")


def run_command(schema: type, config_name: str, run: Callable[[Any, Path], object]) -> None:
    """Run a command with the `key=value` arguments of this process, and end the process with its exit code.

    Args:
        schema: the dataclass that the settings are checked against.
        config_name: name of the YAML file under `configs/` that has the command's defaults.
        run: called with the settings and the folder that the command writes to. If it raises a `ValueError` or an
            `OSError`, the user sees one line, and the exit code is 1.
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
            disk_full = isinstance(error, OSError) and error.errno == errno.ENOSPC  # such an error names no file
            sys.exit(f"error: {f'{folder}: ' if disk_full else ''}{error}")
        except KeyboardInterrupt:
            sys.exit(130)

    try:
        check_overrides(schema, sys.argv[1:])
    except ValueError as error:  # a ConfigError; or YAML takes a value for a date, and there is no such date
        sys.exit(f"error: {error}")
    sys.argv[1:] = _with_sweeps(_with_named_sections(schema, sys.argv[1:]))
    if os.environ.get("RANK", "0") != "0" and not any(one.startswith("hydra.run.dir=") for one in sys.argv):
        # all ranks use rank 0's folder; the default, named after the time, could differ from rank to rank
        sys.argv.append("hydra.run.dir=.")
    main()


def _value(argument: str, text: str) -> Any:
    """The value of an override. If it has brackets, it is read as Hydra does, which is not quite YAML."""
    if text[:1] not in "[{" or not text:
        return yaml.safe_load(text)
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        return OverridesParser.create().parse_override(argument).value()
    except OverrideParseException as error:
        raise ConfigError(f"command line: {argument}: {str(error).splitlines()[0]}") from None


def _with_named_sections(schema: type, arguments: Sequence[str]) -> list[str]:
    """The overrides in a form that Hydra takes. It refuses keys that users name themselves, such as those of the data
    sets in data.mix, so all overrides below such a mapping become one of the whole mapping, `++data.mix={name:{…}}`."""
    kept, named = [], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.lstrip("+")
        mapping = _mapping_above(schema, key) if equals else None
        if mapping is None:
            kept.append(argument)
            continue
        if mapping == key:  # the argument sets the whole mapping
            kept.append(f"++{key}={value}")
            continue
        *path, last = key.removeprefix(f"{mapping}.").split(".")
        inner = named.setdefault(mapping, {})
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return kept + [f"++{mapping}={_literal(inner)}" for mapping, inner in named.items()]


def _with_sweeps(arguments: Sequence[str]) -> list[str]:
    """The overrides with a list of files of a group, data=[x,y], as a sweep over them, -m data=x,y. Hydra would merge
    the files, of which the later would replace the earlier."""
    swept = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        names = _listed(value) if (config_dir() / key).is_dir() else []
        swept.append(f"{key}={','.join(names)}" if names else argument)
    return swept if swept == list(arguments) or {"-m", "--multirun"} & set(swept) else ["--multirun", *swept]


def _listed(value: str) -> list[str]:
    """The names in "[x,y]"; [] if the value is no list."""
    return [name.strip() for name in value[1:-1].split(",")] if value.startswith("[") and value.endswith("]") else []


def _mapping_above(schema: type, key: str) -> str | None:
    """The beginning of a dotted key, or all of it, that leads to a mapping from names to values; else None."""
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
    """A mapping in Hydra's grammar, with the values as the user wrote them."""
    if not isinstance(value, dict):
        return value
    return "{" + ",".join(f"{name}:{_literal(inner)}" for name, inner in value.items()) + "}"


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    """From "a.b" and 1 to {"a": {"b": 1}}."""
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
                raise ConfigError(f"{source}: {prefix}{key} must be a list of sections, not {value!r}")
            sections = {f"{prefix}{key}[{i}]": item for i, item in enumerate(value)}
        elif get_origin(types[key]) is dict:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {prefix}{key} must be a mapping from names to sections, not {value!r}")
            sections = {f"{prefix}{key}.{name}": item for name, item in value.items()}
        for name, section in sections.items():
            if not isinstance(section, dict):
                raise ConfigError(f"{source}: {name} must be a section of settings, not {section!r}")
            _check_keys(inner, section, source, prefix=f"{name}.")
