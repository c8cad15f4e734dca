"""What STYLE asks of every file and a machine can check. Each failure names the places and says what to do about
them.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector

from runtime.settings import Settings, known_keys

ROOT = Path(__file__).parents[1]
PRODUCT = (
    "protocol", "storage", "runtime", "mobility_agent", "process_server", "config_server", "recovery", "farpoint",
)  # fmt: skip
PROGRAM_OF_PACKAGE = {
    "mobility_agent": "mobility-agent",
    "process_server": "process-server",
    "config_server": "config-server",
    "farpoint": "farpoint",
}

FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 600
VAGUE_NAMES = re.compile(r"(utils?|commons?|helpers?|managers?|base|misc)")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
REGISTRY_HOST = re.compile(
    r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|yarnpkg\.com|crates\.io|proxy\.golang\.org|rubygems\.org)\b"
    r"|^\s*--(?:extra-)?index-url",
    re.MULTILINE,
)
MACHINE_PATH = re.compile(r"(?<![\w./~$}-])/(?:work|home|root|Users)/\w[\w./-]*")
FREE_TASKS = {"ensure_future", "gather", "wait_for", "as_completed", "run_coroutine_threadsafe"}

NOT_CORE = {
    "protocol.transport": "moves the bytes",
    "storage.backends": "speaks to the stores",
    "storage.disk_archive": "the one door: composes cores and a store",
    "storage.parallel_reads": "runs several reads of a store at once",
    "storage.keys": "draws data keys from the operating system unless they are given",
    "storage.sealing": "keeps one compressor for each thread",
}
"""All of protocol and storage but these is a core, as is every core/."""

READS_ENVIRONMENT = {
    "runtime/settings.py": "the one way in for settings",
    "runtime/service.py": "systemd's NOTIFY_SOCKET and WATCHDOG_USEC",
    "storage/backends/open_store.py": "the usual Azure variables",
}


@functools.cache
def tracked_files() -> tuple[Path, ...]:
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the project is known by git, and this is no checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_files(*, product_only: bool = False) -> list[Path]:
    return [
        path
        for path in tracked_files()
        if path.suffix == ".py" and (not product_only or path.relative_to(ROOT).parts[0] in PRODUCT)
    ]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=name_of(path))


def product_nodes() -> Iterator[tuple[Path, ast.AST]]:
    for path in python_files(product_only=True):
        for node in ast.walk(parsed(path)):
            yield path, node


def refuse(places: list[str], advice: str) -> None:
    """Fails with the places, one a line, and what to do about them."""
    if places:
        pytest.fail(advice + "\n" + "\n".join(f"  {place}" for place in sorted(places)), pytrace=False)


def texts() -> Iterator[tuple[Path, str]]:
    for path in tracked_files():
        try:
            yield path, path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def matches(pattern: re.Pattern[str], *, apart_from: Callable[[Path], bool] = lambda path: False) -> list[str]:
    return [
        f"{name_of(path)}:{text.count(chr(10), 0, found.start()) + 1}: {found[0].strip()}"
        for path, text in texts()
        if not apart_from(path)
        for found in pattern.finditer(text)
    ]


def test_functions_fit_a_screen() -> None:
    places = [
        f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines"
        for path in python_files()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]
    refuse(places, f"A function has at most {FUNCTION_LINES_MAX} lines: let it branch, move the work to pure helpers.")


def test_product_modules_have_one_job() -> None:
    places = [
        f"{name_of(path)} has {length} lines"
        for path in python_files(product_only=True)
        if (length := path.read_text("utf-8").count("\n")) > MODULE_LINES_MAX
    ]
    refuse(places, f"A product module has at most {MODULE_LINES_MAX} lines: split it by what it knows.")


def test_modules_are_named_for_what_they_do() -> None:
    places = [
        name_of(path)
        for path in python_files()
        if any(VAGUE_NAMES.fullmatch(Path(part).stem) for part in path.relative_to(ROOT).parts)
    ]
    refuse(places, "No module is named utils, common, helpers, manager, base or misc: name it for its job.")


def test_every_module_says_what_it_is_for() -> None:
    places = [
        name_of(path)
        for path in python_files()
        if ast.get_docstring(parsed(path)) is None and (parsed(path).body or path.relative_to(ROOT).parts[0] in PRODUCT)
    ]
    refuse(places, "A module opens with one sentence on its purpose, then the invariants it keeps.")


def test_only_a_task_group_starts_tasks() -> None:
    places = []
    for path, node in product_nodes():
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        owner = ast.unparse(node.func.value).rpartition(".")[2] if isinstance(node.func, ast.Attribute) else ""
        if called in FREE_TASKS or (called == "create_task" and not owner.endswith("group")):
            places.append(f"{name_of(path)}:{node.lineno}: {ast.unparse(node.func)}")
    refuse(
        places,
        "Only an asyncio.TaskGroup (in a variable whose name ends in `group`) starts tasks; deadlines are "
        "asyncio.timeout. What ensure_future, gather, wait_for and as_completed start has no owner.",
    )


def test_product_code_does_not_print() -> None:
    places = [
        f"{name_of(path)}:{node.lineno}"
        for path, node in product_nodes()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    refuse(places, "Data goes out through runtime.output, everything else through structlog or runtime.output.notice.")


def _catches_everything(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(one is None or ast.unparse(one) in ("Exception", "BaseException") for one in kinds)


def test_no_error_is_swallowed_unseen() -> None:
    places = []
    for path, node in product_nodes():
        if isinstance(node, ast.ExceptHandler) and _catches_everything(node.type):
            handler = "\n".join(path.read_text("utf-8").splitlines()[node.lineno - 1 : node.end_lineno])
            raises = any(isinstance(inner, ast.Raise) for statement in node.body for inner in ast.walk(statement))
            if not raises and "# why:" not in handler:
                places.append(f"{name_of(path)}:{node.lineno}: except {ast.unparse(node.type) if node.type else ''}")
        is_suppression = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
        if is_suppression and any(_catches_everything(argument) for argument in node.args):
            places.append(f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}")
    refuse(places, "Catch the errors you can handle by type; who catches all of them re-raises, or says `# why:` not.")


def test_only_main_modules_read_the_environment() -> None:
    places = [
        f"{name_of(path)}:{node.lineno}"
        for path, node in product_nodes()
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb", "os.putenv")
        and path.name != "__main__.py"
        and name_of(path) not in READS_ENVIRONMENT
    ]
    refuse(places, "Settings are read once, in __main__ by runtime.settings.load, and handed down as values.")


def test_the_import_contract_covers_every_core() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (covered,) = (
        contract["source_modules"] for contract in contracts if contract["name"].startswith("Cores do no I/O")
    )
    places = []
    for path in python_files(product_only=True):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        is_core = "core" in parts or (parts[0] in ("protocol", "storage") and len(module.split(".")) > 1)
        if is_core and not any(_is_within(module, other) for other in [*covered, *NOT_CORE]):
            places.append(module)
    refuse(
        places,
        "These are cores, but the import contract in pyproject.toml does not cover them. Add them to its "
        "source_modules; if they must do I/O, add them to NOT_CORE here with the reason.",
    )


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_nothing_is_left_unfinished() -> None:
    refuse(matches(UNFINISHED, apart_from=lambda path: "lock" in path.name), "Do it, or open an issue, or delete it.")


def test_no_tracked_file_names_a_package_registry() -> None:
    refuse(matches(REGISTRY_HOST), "Packages come from whatever index a machine is set up for; no file names one.")


def test_no_tracked_file_names_a_path_of_this_machine() -> None:
    refuse(matches(MACHINE_PATH), "Paths are relative to the checkout, or under /etc, /var, /run, /srv, or temporary.")


def declared_metrics() -> set[str]:
    """Every metric that a metrics.py names, and those that prometheus_client's process collector makes for us."""
    names = {
        node.value
        for path, node in product_nodes()
        if path.name == "metrics.py"
        and isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"farpoint_[a-z0-9_]+", node.value)
    }
    for metric in ProcessCollector(namespace="farpoint", registry=CollectorRegistry()).collect():
        names.add(f"{metric.name}_total" if metric.type == "counter" else metric.name)
    return names


def test_metrics_are_declared_in_metrics_modules_only() -> None:
    places = [
        f"{name_of(path)}:{node.lineno}: {ast.unparse(node.func)}({ast.unparse(node.args[0])}, …)"
        for path, node in product_nodes()
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in ("Counter", "Gauge", "Histogram", "Summary", "Info")
        and node.args
        and "farpoint_" in ast.unparse(node.args[0])
        and path.name != "metrics.py"
    ]
    refuse(places, "Metrics are declared in the package's metrics.py.")


def test_the_document_lists_each_metric_and_nothing_else() -> None:
    document = ROOT / "docs" / "metrics.md"
    if not document.exists():
        pytest.skip("docs/metrics.md does not exist yet")
    listed = re.findall(r"^\|\s*`(farpoint_[a-z0-9_]+)", document.read_text("utf-8"), re.MULTILINE)
    declared = declared_metrics()
    places = [f"{name} is declared, but not listed" for name in declared - set(listed)]
    places += [f"{name} is listed, but not declared" for name in set(listed) - declared]
    places += [f"{name} is listed {listed.count(name)} times" for name in set(listed) if listed.count(name) > 1]
    refuse(
        places,
        "docs/metrics.md has one table row for each metric of */metrics.py, beginning with its name: | `farpoint_…",
    )


def settings_keys() -> Iterator[tuple[str, str]]:
    """(program, dotted key) of every program's settings."""
    for package, program in PROGRAM_OF_PACKAGE.items():
        if (ROOT / package / "settings.py").exists():
            module = importlib.import_module(f"{package}.settings")
            for _, kind in inspect.getmembers(module, inspect.isclass):
                if issubclass(kind, Settings) and kind.__module__ == module.__name__:
                    yield from ((program, key) for key, _ in known_keys(kind))


def test_the_document_lists_each_setting_once_under_its_program() -> None:
    document = ROOT / "docs" / "settings.md"
    if not document.exists():
        pytest.skip("docs/settings.md does not exist yet")
    listed: list[tuple[str, str]] = []
    program = ""
    for line in document.read_text("utf-8").splitlines():
        if heading := re.match(r"##\s+`?([a-z-]+)`?\s*$", line):
            program = heading[1]
        elif row := re.match(r"\|\s*`([a-z0-9_.]+)`", line):
            listed.append((program, row[1]))
    known = set(settings_keys())
    places = [f"{program}: {key} exists, but is not listed" for program, key in known - set(listed)]
    places += [f"{program}: {key} is listed, but does not exist" for program, key in set(listed) - known]
    places += [f"{name[0]}: {name[1]} is listed more than once" for name in set(listed) if listed.count(name) > 1]
    refuse(
        places, "docs/settings.md has a heading `## program` and under it one table row for each of its keys: | `key` |"
    )


def test_what_documents_name_as_evidence_exists() -> None:
    code = "\n".join(path.read_text("utf-8") for path in python_files())
    known = set(re.findall(r"def (test_\w+)", code)) | {path.name for path in tracked_files()}
    places: list[str] = []
    for path in tracked_files():
        if path.suffix == ".md":
            words = re.findall(r"`(tests/[\w./-]+|test_\w+(?:\.py)?)`", path.read_text("utf-8"))
            places += [f"{name_of(path)}: {word}" for word in words if word not in known and not (ROOT / word).exists()]
    refuse(places, "A test or a file that a document names must exist: name the one that shows it.")


LONG_FUNCTION = '"""Long."""\ndef long():\n' + "    x = 1\n" * FUNCTION_LINES_MAX
PLANTED = [
    (test_functions_fit_a_screen, "tests/x.py", LONG_FUNCTION),
    (test_product_modules_have_one_job, "storage/x.py", '"""Long."""\n' + "x = 1\n" * MODULE_LINES_MAX),
    (test_modules_are_named_for_what_they_do, "storage/utils.py", ""),
    (test_modules_are_named_for_what_they_do, "tests/helpers/x.py", ""),
    (test_every_module_says_what_it_is_for, "storage/__init__.py", ""),
    (test_every_module_says_what_it_is_for, "tests/x.py", "x = 1\n"),
    (test_only_a_task_group_starts_tasks, "storage/x.py", "asyncio.create_task(f())\n"),
    (test_only_a_task_group_starts_tasks, "storage/x.py", "await asyncio.gather(f())\n"),
    (test_product_code_does_not_print, "storage/x.py", "print(1)\n"),
    (test_no_error_is_swallowed_unseen, "storage/x.py", "try:\n    f()\nexcept Exception:\n    pass\n"),
    (test_no_error_is_swallowed_unseen, "storage/x.py", "try:\n    f()\nexcept (OSError, BaseException):\n    pass\n"),
    (test_no_error_is_swallowed_unseen, "storage/x.py", "try:\n    f()\nexcept:\n    pass\n"),
    (test_no_error_is_swallowed_unseen, "storage/x.py", "with suppress(Exception):\n    f()\n"),
    (test_only_main_modules_read_the_environment, "storage/x.py", "os.environ['X']\n"),
    (test_nothing_is_left_unfinished, "README.md", "TO" + "DO: more"),
    (test_no_tracked_file_names_a_package_registry, "lock", "https://files.python" + "hosted.org/x"),
    (test_no_tracked_file_names_a_package_registry, "lock", "x\n--index" + "-url https://example.org\n"),
    (test_no_tracked_file_names_a_path_of_this_machine, "x.md", "see /ho" + "me/me/x"),
    (test_metrics_are_declared_in_metrics_modules_only, "storage/x.py", "Counter('farpoint_x', 'X')\n"),
    (test_the_document_lists_each_metric_and_nothing_else, "docs/metrics.md", "| `farpoint_unheard_of_total` | … |\n"),
    (
        test_the_document_lists_each_setting_once_under_its_program,
        "docs/settings.md",
        "## farpoint\n| `unheard_of` |\n",
    ),
]


@pytest.mark.parametrize(("check", "name", "contents"), PLANTED)
def test_each_check_finds_what_is_planted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check: Callable[[], None], name: str, contents: str
) -> None:
    planted = tmp_path / name
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(contents)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "tracked_files", lambda: (planted,))
    with pytest.raises(pytest.fail.Exception):
        check()
