"""From a name and some ``key=value`` words to a finished folder of results.

Settings are a dataclass with defaults (``Config`` of the experiment's module), overridden by a YAML file, overridden
by the command line. OmegaConf checks names and types; the dataclass's ``__post_init__`` checks values.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.checks import BadSetting
from experiments.registry import EXPERIMENTS, Experiment
from laplace_kf.errors import UnknownName
from laplace_kf.reports import missing_extra, processor_threads

try:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
except ImportError as error:
    raise missing_extra(error.name) from error

if typing.TYPE_CHECKING:
    from laplace_kf.reports.html import Report

__all__ = ["CONFIGS", "command", "config_names", "resolve", "run"]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""Where named configuration files are."""


def config_names() -> dict[str, list[str]]:
    """Id of an experiment → names of its configuration files, its default first; every file is read once."""
    found: dict[str, list[str]] = {experiment_id: [] for experiment_id in EXPERIMENTS}
    for path in sorted(CONFIGS.glob("*.yaml")):
        found[_layers(path)[0]["experiment"]].append(path.stem)
    for experiment_id, names in found.items():
        names.sort(key=lambda name: name != EXPERIMENTS[experiment_id].config)
    return found


def resolve(name: str, overrides: Sequence[str] = ()) -> tuple[Experiment, Any]:
    """The experiment and its settings.

    Args:
        name: an experiment's id, the name of a file in ``configs/`` (without ``.yaml``), or the path of such a file.
        overrides: ``key=value`` words.

    Returns:
        The entry of the list and an instance of its ``Config``.

    Raises:
        UnknownName: for an unknown experiment, configuration or setting (lists the known ones).
        NotYet: for an experiment that has not been written.
        BadSetting: for a value of the wrong type or range (says what is allowed).
    """
    if name in EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        experiment.load()  # not written yet: say so, whatever else may be wrong
        layers = _layers(CONFIGS / f"{experiment.config}.yaml")
    else:
        layers = _layers(_config_path(name))
    owner = layers[0].pop("experiment", None)
    experiment = EXPERIMENTS[owner]
    schema = experiment.load().Config
    settings = OmegaConf.structured(schema)
    for layer in [*layers, *(_parse(word, experiment.id, schema) for word in overrides)]:
        layer.pop("experiment", None)
        settings = _merge(settings, layer, experiment.id, schema)
    try:
        return experiment, OmegaConf.to_object(settings)
    except (OmegaConfBaseException, ValueError) as error:
        raise BadSetting(f"{experiment.id}: {_first_line(error)}") from error


def run(experiment: Experiment, config: Any, out: Path) -> Report:
    """Run an experiment and write ``result.json``, PNG files and ``report.html`` into ``out``.

    A resumable one keeps its finished parts in ``out/parts``.
    """
    start = time.perf_counter()
    with processor_threads(getattr(config, "threads", 0)):
        module = experiment.load()
        report: Report = module.run(config, out / "parts") if experiment.resumable else module.run(config)
        report.details = {"experiment": experiment.id, **report.details, "wall_time_s": time.perf_counter() - start}
        report.save(out)
    return report


FREE = ("progress", "threads", "sets", "sources", "splits", "anew")
"""Settings that no number of a result hangs on, and those of which a result has only the last piece's."""


def command(name: str, config: Mapping[str, Any]) -> str:
    """What makes a result again: the experiment with the settings in which a run differs from its configuration."""
    usual = dataclasses.asdict(resolve(name)[1])
    own = [
        _word(key, value) for key, value in config.items() if key in usual and key not in FREE and value != usual[key]
    ]
    return " ".join([f"python -m experiments run {name}", *own])


def _word(key: str, value: Any) -> str:
    """A setting as a shell takes it: plain where names of several words or commas do not need quotes."""
    if any(mark in str(each) for each in (value if isinstance(value, list) else [value]) for mark in " ,"):
        return shlex.quote(f"{key}={json.dumps(value)}")
    return f"{key}={value}".replace(" ", "").replace("'", "")


def _config_path(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UnknownName("configuration file", name, [path.name for path in CONFIGS.glob("*.yaml")])
        return Path(name)
    named = CONFIGS / f"{name}.yaml"
    if not named.is_file():
        known = [*EXPERIMENTS, *(path.stem for path in CONFIGS.glob("*.yaml"))]
        raise UnknownName("experiment or configuration", name, known)
    return named


def _layers(path: Path) -> list[dict[str, Any]]:
    """The file's settings, after those of the file that its ``base`` names (in the same folder or in ``configs/``)."""
    settings = _read(path)
    base = settings.pop("base", None)
    if base is None:
        if settings.get("experiment") not in EXPERIMENTS:
            raise UnknownName(f"experiment in {path.name}:", settings.get("experiment"), EXPERIMENTS)
        return [settings]
    beside = path.parent / f"{base}.yaml"
    return [*_layers(beside if beside.is_file() else _config_path(base)), settings]


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # the YAML parser has its own error classes
        raise BadSetting(f"{path.name} is not readable as YAML: {_first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise BadSetting(f"{path.name} holds no settings; expected lines 'key: value'.")
    return {str(key): value for key, value in typing.cast(dict[str, Any], OmegaConf.to_container(loaded)).items()}


def _parse(word: str, owner: str, schema: type) -> dict[str, Any]:
    key, equals, _ = word.partition("=")
    if not equals:
        raise BadSetting(f"{word!r} is not of the form key=value. {_settings(owner, schema)}")
    if key not in _fields(schema):
        raise UnknownName(f"setting of {owner}:", key, _fields(schema))
    return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([word])))


def _merge(settings: Any, layer: dict[str, Any], owner: str, schema: type) -> Any:
    for key, value in layer.items():
        try:
            settings = OmegaConf.merge(settings, {key: value})
        except ConfigKeyError as error:
            raise UnknownName(f"setting of {owner}:", key, _fields(schema)) from error
        except OmegaConfBaseException as error:
            allowed = f"Allowed for {key}: {_allowed(schema, key)}."
            raise BadSetting(f"{key}={value}: {_first_line(error)}. {allowed}") from error
    return settings


def _fields(schema: type) -> list[str]:
    return [field.name for field in dataclasses.fields(schema)]


def _allowed(schema: type, key: str) -> str:
    hint = typing.get_type_hints(schema)[key]
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _settings(owner: str, schema: type) -> str:
    return f"Settings of {owner}: " + ", ".join(f"{name} ({_allowed(schema, name)})" for name in _fields(schema)) + "."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
