"""What every program says to wrong settings, taken ports, locked directories and signals, and how it ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from runtime.exit_codes import ExitCode
from tests.scenarios.conftest import ReplicatedSite
from tests.scenarios.processes import Finished, call_command, run_command, wait_until
from tests.scenarios.site import Endpoint, Site, free_port

PROGRAM_NAMES = ["config-server", "process-server", "mobility-agent", "farpoint"]
SERVICES = ["config-server", "process-server", "mobility-agent"]


@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_an_unknown_setting_is_named_wherever_it_comes_from(program: str, tmp_path: Path) -> None:
    call_command(program, "config", "check").expect(ExitCode.OK)
    done = call_command(program, "config", "check", "--set", "colour=blue")
    done.expect(ExitCode.USAGE, "unknown setting colour")
    settings = tmp_path / "settings.toml"
    settings.write_text('colour = "blue"\n')
    done = call_command(program, "config", "check", "--settings", settings)
    done.expect(ExitCode.USAGE, "unknown setting colour", str(settings))
    variable = "FARPOINT_COLOUR" if program == "farpoint" else f"FARPOINT_{program.upper().replace('-', '_')}_COLOUR"
    done = run_command(program, "config", "check", environment={variable: "blue"})
    done.expect(ExitCode.USAGE, "unknown setting colour", variable)
    settings.write_text("colour = = blue\n")
    call_command(program, "config", "check", "--settings", settings).expect(ExitCode.USAGE, str(settings))


@pytest.mark.parametrize("program", SERVICES)
def test_an_unknown_setting_keeps_a_service_from_running(program: str, tmp_path: Path) -> None:
    done = run_command(program, "run", "--dir", tmp_path / "state", "--set", "log.colour=blue")
    done.expect(ExitCode.USAGE, "unknown setting log.colour")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_settings_show_where_they_come_from(program: str) -> None:
    rows = call_command(program, "config", "show", "--origin", "-o", "json").expect(ExitCode.OK).json
    assert rows
    assert {row["origin"] for row in rows} == {"default"}


def test_a_service_without_its_state_is_not_found(tmp_path: Path) -> None:
    store = f"file://{tmp_path}"
    run_command("config-server", "run", "--dir", tmp_path / "c").expect(ExitCode.NOT_FOUND, "config-server init")
    run_command("process-server", "run", "--dir", tmp_path / "p", "--set", f"store={store}").expect(
        ExitCode.NOT_FOUND, "process-server enroll"
    )
    run_command("mobility-agent", "run", "--dir", tmp_path / "a").expect(ExitCode.NOT_FOUND, "mobility-agent enroll")


def test_a_second_program_with_the_same_state_directory_is_locked_out(replicated: ReplicatedSite) -> None:
    site, agent = replicated.site, replicated.agent
    off = ("--set", "observability.address=")
    run_command("mobility-agent", "run", "--dir", agent.directory, *off).expect(ExitCode.LOCKED, "is in use")
    run_command(
        *("process-server", "run", "--dir", site.process_directory, "--set", f"store={site.store_url}"),
        *("--set", f"listen=127.0.0.1:{free_port()}", *off),
    ).expect(ExitCode.LOCKED, "is in use")
    run_command(
        *("config-server", "run", "--dir", site.config_directory, "--listen", f"127.0.0.1:{free_port()}", *off)
    ).expect(ExitCode.LOCKED, "is in use")
    assert site.process_endpoint.is_ready()


def test_a_port_that_is_taken_is_named(site: Site, tmp_path: Path) -> None:
    site.process_server.stop()
    site.config_server.stop()
    with Site(_made(tmp_path / "other")) as other:
        taken = other.data_port
        off = ("--set", "observability.address=")
        done = run_command(
            *("process-server", "run", "--dir", site.process_directory, "--set", f"store={site.store_url}"),
            *("--set", f"listen=127.0.0.1:{taken}", *off),
        )
        done.expect(ExitCode.FAILURE, f"port {taken}", "is taken")
        done = run_command(
            *("config-server", "run", "--dir", site.config_directory, "--listen", f"127.0.0.1:{taken}", *off)
        )
        done.expect(ExitCode.FAILURE, f"port {taken}", "is taken")
        taken_address = other.process_endpoint.address
        done = run_command(
            *("config-server", "run", "--dir", site.config_directory, "--listen", f"127.0.0.1:{free_port()}"),
            *("--set", f"observability.address={taken_address}"),
        )
        done.expect(ExitCode.FAILURE, taken_address.rpartition(":")[2], "is taken")


def test_an_interrupted_service_ends_in_order_with_130(site: Site) -> None:
    agent = site.agent()
    for server in (agent.server, site.process_server, site.config_server):
        server.signal(signal.SIGINT)
        server.expect_end(ExitCode.INTERRUPTED)


def test_a_configuration_server_is_never_made_over_another(site: Site) -> None:
    def init() -> Finished:
        authority = site.root / "vault-authority.key"
        return run_command("config-server", "init", "--dir", site.config_directory, "--authority-key", authority)

    init().expect(ExitCode.LOCKED, "is in use")
    site.config_server.stop()
    before = {
        path.name: path.read_bytes()
        for path in site.config_directory.iterdir()
        if path.is_file() and path.name != "lock"
    }
    init().expect(ExitCode.FAILURE, "holds a configuration server already")
    assert before == {
        path.name: path.read_bytes()
        for path in site.config_directory.iterdir()
        if path.is_file() and path.name != "lock"
    }


def test_every_endpoint_answers(replicated: ReplicatedSite) -> None:
    site = replicated.site
    for endpoint, prefix in (
        (site.config_endpoint, "farpoint_config_server_"),
        (site.process_endpoint, "farpoint_process_server_"),
        (replicated.agent.endpoint, "farpoint_agent_"),
    ):
        wait_until("it is ready", endpoint.is_ready, seconds=30)
        names = endpoint.metric_names()
        assert any(name.startswith(prefix) for name in names)
        assert all(name.startswith("farpoint_") for name in names), names


def test_an_agent_that_does_not_run_says_so(tmp_path: Path) -> None:
    done = run_command("mobility-agent", "status", "--dir", tmp_path / "nowhere")
    assert done.exit_code != ExitCode.OK
    assert "Traceback" not in done.stderr
    assert not Endpoint().answers()


def _made(path: Path) -> Path:
    path.mkdir()
    return path
