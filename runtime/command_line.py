"""What all command lines share: typed errors with their hints on stderr, the documented exit codes, `-o`,
`config show|check`.

Invariants: an expected error never shows a traceback unless `--debug` asks for it; an unexpected one always does.
Nothing but data goes to stdout: logs go to stderr.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from protocol.errors import ReplicationError
from runtime.exit_codes import ExitCode, exit_code_of, expected_errors, is_expected
from runtime.logs import LogSettings, configure_logs
from runtime.output import Output, notice
from runtime.process_memory import forbid_memory_dumps
from runtime.settings import Loaded, Settings, load, parse_assignments, values_of

Command = TypeVar("Command", bound=Callable[..., Any])


class ProgramGroup(click.Group):
    """A program's top group: `@click.group(cls=ProgramGroup)`. It adds `--version` and `--debug`.

    A command's return value, if it is an ExitCode, is the program's.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.append(
            click.Option(["--debug"], is_flag=True, expose_value=False, help="Show tracebacks of errors.")
        )
        click.version_option(package_name="farpoint", message="%(prog)s %(version)s")(self)

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Runs the program and exits; with standalone_mode=False errors are raised and the result is returned."""
        if not options.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **options)
        arguments = list(sys.argv[1:] if args is None else args)
        sys.exit(self._run(arguments, prog_name, options))

    def _run(self, arguments: list[str], prog_name: str | None, options: dict[str, Any]) -> int:
        forbid_memory_dumps()
        # why: structlog's own default is stdout, where data goes; a command that runs a service configures again
        configure_logs(LogSettings(level="warning"), program=prog_name or Path(sys.argv[0]).stem, is_final=False)
        debug = "--debug" in arguments
        try:
            result = super().main(arguments, prog_name, standalone_mode=False, **options)
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except click.Abort as error:
            # why: click raises Abort both for Ctrl-C and for a question that was answered with no
            interrupted = isinstance(error.__cause__ or error.__context__, KeyboardInterrupt)
            notice("interrupted" if interrupted else "aborted")
            return ExitCode.INTERRUPTED if interrupted else ExitCode.FAILURE
        except BrokenPipeError:
            # why: the reader of stdout (head, less) has gone; flushing at exit would complain again
            sys.stdout = sys.stderr
            return ExitCode.FAILURE
        except Exception as error:
            if not is_expected(error):
                raise
            if debug:
                traceback.print_exception(error)
            show_error(error)
            return exit_code_of(error)
        return result if isinstance(result, int) and not isinstance(result, bool) else ExitCode.OK


def show_error(error: BaseException) -> None:
    """Prints an expected error (each of a group) with its hint on stderr."""
    shown: set[str] = set()
    for member in expected_errors(error):
        text = f"error: {member}"
        hint = member.hint if isinstance(member, ReplicationError) else ""
        if text not in shown:
            notice(text + (f"\n  {hint}" if hint else ""))
        shown.add(text)


def output_option(command: Command) -> Command:
    """Adds `-o table|json`; the command gets `output: Output`."""

    def callback(context: click.Context, parameter: click.Parameter, value: str) -> Output:
        return Output(format="json" if value == "json" else "table")

    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        callback=callback,
        help="How data is printed on stdout.",
    )(command)


def with_settings(
    settings_type: type[Settings], program: str, *, flags: dict[str, str] | None = None
) -> Callable[[Command], Command]:
    """Adds `--settings FILE` and `--set KEY=VALUE`; the command gets `loaded: Loaded[…]`.

    flags: parameter name of a click option on the same command → dotted settings key. Such a parameter goes into the
    settings, above `--set`, and is not passed on.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def load_first(
            *arguments: Any, settings_file: Path | None, assignments: tuple[str, ...], **options: Any
        ) -> Any:
            values = parse_assignments(assignments)
            values |= {
                key: value for name, key in (flags or {}).items() if (value := options.pop(name)) not in (None, ())
            }
            loaded = load(settings_type, program=program, file=settings_file, flags=values)
            return command(loaded=loaded, **options)

        with_file = click.option(
            "--settings",
            "settings_file",
            type=click.Path(path_type=Path, dir_okay=False),
            help=f"Settings file (TOML); /etc/farpoint/{program}.toml by default, if it exists.",
        )
        with_values = click.option(
            "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; can be repeated."
        )
        return with_file(with_values(load_first))  # type: ignore[return-value]

    return decorate


def config_commands(settings_type: type[Settings], program: str) -> click.Group:
    """The group `config` with `show [--origin]` and `check`, for a program to add to its own."""

    @click.group("config")
    def config() -> None:
        """Show and check the settings."""

    @config.command("show")
    @click.option("--origin", is_flag=True, help="Also show where each value comes from.")
    @output_option
    @with_settings(settings_type, program)
    def show(loaded: Loaded[Settings], output: Output, origin: bool) -> None:
        """Print every setting with its value."""
        output.rows(
            [
                {"key": key, "value": value} | ({"origin": loaded.origins[key]} if origin else {})
                for key, value in values_of(loaded.settings).items()
            ]
        )

    @config.command("check")
    @with_settings(settings_type, program)
    def check(loaded: Loaded[Settings]) -> None:
        """Fail, naming the key, if a setting is unknown or bad."""
        notice(f"{len(loaded.origins)} settings are good")

    return config
