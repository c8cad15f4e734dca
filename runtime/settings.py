"""A program's settings: defaults, then a TOML file, then FARPOINT_<PROGRAM>_… of the environment, then flags; each
value's origin is known.

Invariants: an unknown key fails wherever it comes from, with its name and the nearest known one; only `load` looks at
the environment, and only `__main__` calls it; a secret is the path of a file, never a value.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from runtime.errors import SettingInvalid, SettingsFileInvalid, SettingUnknown

PROGRAMS: Final = ("mobility-agent", "process-server", "config-server", "farpoint")
DEFAULT_DIRECTORY: Final = Path("/etc/farpoint")
_SECTION_DELIMITER: Final = "__"


class Settings(BaseSettings):
    """The base of each program's settings. Sections are frozen BaseModels with extra="forbid".

    Made directly (`AgentSettings(state_directory=…)`, as tests do) it looks at nothing but its arguments.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, nested_model_default_partial_update=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


SettingsType = TypeVar("SettingsType", bound=Settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Generic[SettingsType]):
    """settings, and by dotted key (`log.level`) where each value comes from: `default`, `flag`, `file …`,
    `environment …`."""

    settings: SettingsType
    origins: Mapping[str, str]


def load(
    settings_type: type[SettingsType],
    *,
    program: str,
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Loaded[SettingsType]:
    """Reads the settings of `program` (its command's name).

    file: must exist if given; else /etc/farpoint/<program>.toml counts if it exists. flags: by dotted key, None
    meaning that the flag was not given. environment: os.environ unless given.
    Raises SettingsFileInvalid, SettingUnknown or SettingInvalid.
    """
    known = dict(known_keys(settings_type))
    path = file or _default_file(program)
    layers = [
        (_from_file(settings_type, path), f"file {path}"),
        (_from_environment(settings_type, program, os.environ if environment is None else environment, known), ""),
        (_nested(_known({key: value for key, value in (flags or {}).items() if value is not None}, known)), "flag"),
    ]
    merged: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    for values, origin in layers:
        for key, value in _leaves(values, known):
            source = origin or f"environment {_variable(program, key)}"
            _check_known(key, known, source)
            origins[key] = source
            _put(merged, key, value)
    try:
        return Loaded(settings=settings_type(**merged), origins=origins)
    except ValidationError as error:
        raise _invalid(error, origins) from error


def known_keys(settings_type: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf key of a settings type in dotted form, with its default (None if it must be given)."""
    for name, field in settings_type.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from known_keys(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.get_default(call_default_factory=False)


def values_of(settings: BaseModel) -> dict[str, object]:
    """Every value of loaded settings by dotted key."""
    return {key: _look_up(settings, key) for key in dict(known_keys(type(settings)))}


def parse_assignments(assignments: Sequence[str]) -> dict[str, object]:
    """Turns `KEY=VALUE` texts (of a repeated flag) into flags for `load`. Raises SettingInvalid."""
    flags: dict[str, object] = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise SettingInvalid(key=assignment, origin="flag", reason="must be KEY=VALUE")
        try:
            flags[key] = tomllib.loads(f"value = {value}")["value"] if value[:1] in "[{" and value else value
        except (ValueError, RecursionError) as error:
            # why: numbers of thousands of digits and deep nesting are what the parser has no error of its own for.
            raise SettingInvalid(key=key, origin="flag", reason=str(error)) from error
    return flags


def _default_file(program: str) -> Path | None:
    path = DEFAULT_DIRECTORY / f"{program}.toml"
    return path if path.exists() else None


def _from_file(settings_type: type[Settings], path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not path.is_file():
        raise SettingsFileInvalid(path=path, reason="there is no such file")
    try:
        return TomlConfigSettingsSource(settings_type, toml_file=path, deep_merge=True).toml_data
    except (ValueError, RecursionError) as error:
        raise SettingsFileInvalid(path=path, reason=f"not TOML: {error}") from error
    except OSError as error:
        raise SettingsFileInvalid(path=path, reason=error.strerror) from error


def environment_prefix(program: str) -> str:
    """`FARPOINT_MOBILITY_AGENT_` for mobility-agent; `FARPOINT_` for farpoint itself."""
    return "FARPOINT_" if program == "farpoint" else f"FARPOINT_{program.upper().replace('-', '_')}_"


def _variable(program: str, key: str) -> str:
    return environment_prefix(program) + key.upper().replace(".", _SECTION_DELIMITER)


def _from_environment(
    settings_type: type[Settings], program: str, environment: Mapping[str, str], known: Mapping[str, object]
) -> dict[str, Any]:
    prefix = environment_prefix(program)
    others = tuple(environment_prefix(other) for other in PROGRAMS if len(environment_prefix(other)) > len(prefix))
    ours = {
        name: value for name, value in environment.items() if name.startswith(prefix) and not name.startswith(others)
    }
    variables = {_variable(program, key) for key in known}
    for name in sorted(ours.keys() - variables):
        key = name.removeprefix(prefix).lower().replace(_SECTION_DELIMITER, ".")
        raise SettingUnknown(key=key, origin=f"environment {name}", nearest=_nearest(key, known))
    source = EnvSettingsSource(settings_type, env_prefix=prefix, env_nested_delimiter=_SECTION_DELIMITER)
    source.env_vars = {name.lower(): value for name, value in ours.items()}
    try:
        return source()
    except ValueError as error:
        raise SettingInvalid(key=prefix + "…", origin="the environment", reason=str(error)) from error


def _leaves(values: Mapping[str, Any], known: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = prefix + name
        is_known_section = any(other.startswith(f"{key}.") for other in known)
        if isinstance(value, Mapping) and key not in known and (value or is_known_section):
            yield from _leaves(value, known, f"{key}.")
        else:
            yield key, value


def _check_known(key: str, known: Mapping[str, object], origin: str) -> None:
    if key not in known:
        raise SettingUnknown(key=key, origin=origin, nearest=_nearest(key, known))


def _nearest(key: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    same_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    return (same_name or close or [""])[0]


def _known(flags: Mapping[str, object], known: Mapping[str, object]) -> Mapping[str, object]:
    for key in flags:
        _check_known(key, known, "flag")
    return flags


def _nested(values: Mapping[str, object]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        _put(nested, key, value)
    return nested


def _put(tree: dict[str, Any], key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


def _look_up(settings: BaseModel, key: str) -> object:
    value: object = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _invalid(error: ValidationError, origins: Mapping[str, str]) -> SettingInvalid:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    key = next(
        (
            ".".join(location[:length])
            for length in range(len(location), 0, -1)
            if ".".join(location[:length]) in origins
        ),
        ".".join(location) or "settings",
    )
    reason = "must be given" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
    return SettingInvalid(key=key, origin=origins.get(key, "the settings together"), reason=reason)
