"""Settings: defaults, file, environment, flags, in this order; origins; unknown and bad keys are named; units."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import SettingInvalid, SettingsFileInvalid, SettingUnknown
from runtime.exit_codes import ExitCode, exit_code_of
from runtime.logs import LogSettings
from runtime.observability import ObservabilitySettings
from runtime.settings import Settings, load, parse_assignments, values_of
from runtime.units import Bytes, Seconds, parse_bytes, parse_seconds


class CacheSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    limit_bytes: Bytes = 2**30
    directory: Path = Path("/var/lib/farpoint/cache")


class ExampleSettings(Settings):
    server: str
    idle_seconds: Seconds = Field(default=30, gt=0)
    exclude: tuple[str, ...] = ()
    key_file: Path | None = None
    cache: CacheSettings = CacheSettings()
    log: LogSettings = LogSettings()
    observability: ObservabilitySettings = ObservabilitySettings(address="127.0.0.1:9465")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(
        """
        server = "https://from-file"
        idle_seconds = "2 min"
        exclude = ["a", "b"]
        [cache]
        limit_bytes = "16 MiB"
        [log]
        level = "debug"
        """
    )
    return path


def load_example(
    file: Path | None = None, flags: dict[str, object] | None = None, **environment: str
) -> tuple[ExampleSettings, dict[str, str]]:
    loaded = load(ExampleSettings, program="process-server", file=file, flags=flags, environment=environment)
    return loaded.settings, dict(loaded.origins)


def test_each_layer_covers_the_one_before_key_by_key(file: Path) -> None:
    settings, origins = load_example(
        file,
        {"log.level": "error", "server": None},
        FARPOINT_PROCESS_SERVER_IDLE_SECONDS="5",
        FARPOINT_PROCESS_SERVER_CACHE__DIRECTORY="/srv/cache",
        FARPOINT_PROCESS_SERVER_LOG__LEVEL="warning",
        FARPOINT_MOBILITY_AGENT_SERVER="https://not-for-us",
        PATH="/bin",
    )
    assert settings.server == "https://from-file"
    assert settings.idle_seconds == 5
    assert settings.exclude == ("a", "b")
    assert settings.cache == CacheSettings(limit_bytes=16 * 2**20, directory=Path("/srv/cache"))
    assert settings.log == LogSettings(level="error", format="auto")
    assert origins == {
        "server": f"file {file}",
        "idle_seconds": "environment FARPOINT_PROCESS_SERVER_IDLE_SECONDS",
        "exclude": f"file {file}",
        "key_file": "default",
        "cache.limit_bytes": f"file {file}",
        "cache.directory": "environment FARPOINT_PROCESS_SERVER_CACHE__DIRECTORY",
        "log.level": "flag",
        "log.format": "default",
        "observability.address": "default",
        "observability.tls_certificate_file": "default",
        "observability.tls_key_file": "default",
    }


def test_a_section_changed_in_one_key_keeps_its_programs_defaults_in_the_others() -> None:
    settings, _ = load_example(
        None, {"server": "x", "observability.tls_key_file": "k", "observability.tls_certificate_file": "c"}
    )
    assert settings.observability.address == "127.0.0.1:9465"


def test_lists_come_from_the_environment_and_from_flags_too() -> None:
    settings, _ = load_example(None, {"server": "x"}, FARPOINT_PROCESS_SERVER_EXCLUDE='["c", "d"]')
    assert settings.exclude == ("c", "d")
    settings, _ = load_example(None, parse_assignments(["server=x", 'exclude=["e=1"]']))
    assert settings.exclude == ("e=1",)


@pytest.mark.parametrize(
    ("line", "key", "nearest"),
    [
        ('serfer = "x"', "serfer", "server"),
        ("[cache]\nlimit_byte = 1", "cache.limit_byte", "cache.limit_bytes"),
        ("limit_bytes = 1", "limit_bytes", "cache.limit_bytes"),
        ('[logs]\nlevel = "debug"', "logs.level", "log.level"),
        ("[logs]", "logs", ""),
        ("zzzz = 1", "zzzz", ""),
    ],
)
def test_an_unknown_key_in_the_file_is_named_with_the_nearest_known_one(
    tmp_path: Path, line: str, key: str, nearest: str
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(line)
    with pytest.raises(SettingUnknown) as caught:
        load_example(path)
    assert caught.value.key == key
    assert caught.value.origin == f"file {path}"
    assert caught.value.nearest == nearest
    assert nearest in caught.value.hint
    assert exit_code_of(caught.value) is ExitCode.USAGE


def test_an_unknown_key_in_the_environment_or_a_flag_is_named() -> None:
    with pytest.raises(SettingUnknown, match="environment FARPOINT_PROCESS_SERVER_CACHE__LIMIT") as caught:
        load_example(None, {"server": "x"}, FARPOINT_PROCESS_SERVER_CACHE__LIMIT="1")
    assert caught.value.nearest == "cache.limit_bytes"
    with pytest.raises(SettingUnknown, match="flag"):
        load_example(None, {"server": "x", "idle": 3})


def test_the_operators_own_program_overlooks_the_other_programs_variables() -> None:
    class Own(Settings):
        store: str = ""

    loaded = load(Own, program="farpoint", environment={"FARPOINT_STORE": "s", "FARPOINT_CONFIG_SERVER_X": "y"})
    assert loaded.settings.store == "s"
    with pytest.raises(SettingUnknown):
        load(Own, program="farpoint", environment={"FARPOINT_STOER": "s"})


@pytest.mark.parametrize(
    ("flags", "key", "origin"),
    [
        ({}, "server", "default"),
        ({"server": "x", "idle_seconds": 0}, "idle_seconds", "flag"),
        ({"server": "x", "idle_seconds": "soon"}, "idle_seconds", "flag"),
        ({"server": "x", "cache.limit_bytes": "1 MB"}, "cache.limit_bytes", "flag"),
        ({"server": "x", "log.level": "loud"}, "log.level", "flag"),
        ({"server": "x", "exclude": [1]}, "exclude", "flag"),
        ({"server": "x", "observability.address": "nonsense"}, "observability", "the settings together"),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_origin(flags: dict[str, object], key: str, origin: str) -> None:
    with pytest.raises(SettingInvalid) as caught:
        load_example(None, flags)
    assert (caught.value.key, caught.value.origin) == (key, origin)


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsFileInvalid, match="no such file"):
        load_example(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("server = ")
    with pytest.raises(SettingsFileInvalid, match="not TOML"):
        load_example(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsFileInvalid, match="not TOML"):
        load_example(tmp_path / "binary.toml")


def test_a_section_given_as_a_plain_value_is_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('server = "x"\ncache = 3')
    with pytest.raises((SettingUnknown, SettingInvalid), match="cache"):
        load_example(tmp_path / "settings.toml")


def test_settings_made_directly_look_at_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDLE_SECONDS", "99")
    monkeypatch.setenv("SERVER", "https://from-environment")
    assert ExampleSettings(server="x").idle_seconds == 30
    with pytest.raises(ValidationError):
        ExampleSettings()  # type: ignore[call-arg]


def test_values_come_by_dotted_key() -> None:
    values = values_of(ExampleSettings(server="x"))
    assert values["cache.limit_bytes"] == 2**30
    assert list(values)[:2] == ["server", "idle_seconds"]


@pytest.mark.parametrize(
    ("text", "seconds"), [(5, 5), ("5", 5), ("250 ms", 0.25), ("1.5h", 5400), ("14 d", 1209600), (" 2 min ", 120)]
)
def test_durations_have_named_units(text: object, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(("text", "size"), [(4096, 4096), ("4096", 4096), ("16 MiB", 2**24), ("1.5GiB", 3 * 2**29)])
def test_sizes_have_named_units(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "s", "-1", -1, "1 MB", "1 fortnight", "1e3", True, None, float("nan"), float("inf"), "0.3 B"]
)
def test_what_is_no_quantity_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"number|negative|bytes"):
        parse_bytes(text)
