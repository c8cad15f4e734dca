"""`farpoint vault`: keys 0600 and never over a file, at least two of them, and a check that proves one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from farpoint.__main__ import main
from protocol.signed_records import parse_authority_key
from runtime.exit_codes import ExitCode


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def init(directory: Path, *more: object) -> Result:
    return run(
        *("vault", "init", "--store", f"file://{directory / 'store'}"),
        *("--recovery-key", directory / "one.key", "--recovery-key", directory / "two.key"),
        *("--authority-key", directory / "authority.key", "-o", "json", *more),
    )


def check(directory: Path, key: str, *more: object) -> Result:
    store = f"file://{directory / 'store'}"
    return run("vault", "check-key", "--store", store, "--recovery-key", directory / key, "-o", "json", *more)


def test_a_new_vault_opens_with_each_of_its_keys(tmp_path: Path) -> None:
    made = init(tmp_path)
    assert made.exit_code == ExitCode.OK, made.output
    vault = json.loads(made.stdout)["vault"]
    for key in ("one.key", "two.key"):
        assert (tmp_path / key).stat().st_mode & 0o777 == 0o600
        checked = check(tmp_path, key)
        assert checked.exit_code == ExitCode.OK
        assert json.loads(checked.stdout)["vault"] == vault
    assert parse_authority_key((tmp_path / "authority.key").read_bytes()).vault == vault
    assert (tmp_path / "authority.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("taken", ["one.key", "two.key", "authority.key"])
def test_nothing_is_overwritten_and_nothing_is_left(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    made = init(tmp_path)
    assert made.exit_code == ExitCode.FAILURE
    assert taken in made.stderr
    assert (tmp_path / taken).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.glob("*.key")) == [taken]
    assert not list((tmp_path / "store").rglob("vault.json"))


def test_one_recovery_key_must_be_asked_for_in_so_many_words(tmp_path: Path) -> None:
    arguments = ["vault", "init", "--store", f"file://{tmp_path / 'store'}", "--recovery-key", tmp_path / "one.key"]
    refused = run(*arguments)
    assert refused.exit_code == ExitCode.USAGE
    assert not (tmp_path / "one.key").exists()
    assert run(*arguments, "--single-recovery-key").exit_code == ExitCode.OK
    assert (tmp_path / "vault-authority.key").exists()


def test_a_passphrase_protects_the_keys(tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("correct horse\n")
    (tmp_path / "wrong").write_text("battery staple\n")
    assert init(tmp_path, "--passphrase-file", tmp_path / "passphrase").exit_code == ExitCode.OK
    assert check(tmp_path, "one.key", "--passphrase-file", tmp_path / "passphrase").exit_code == ExitCode.OK
    wrong = check(tmp_path, "one.key", "--passphrase-file", tmp_path / "wrong")
    assert wrong.exit_code == ExitCode.FAILURE
    assert "passphrase is wrong" in wrong.stderr
    assert "needs its passphrase" in check(tmp_path, "one.key").stderr


def test_what_is_no_key_and_what_is_no_vault_are_told_apart(tmp_path: Path) -> None:
    assert init(tmp_path).exit_code == ExitCode.OK
    (tmp_path / "letter").write_text("dear operator")
    assert "not a recovery key file" in check(tmp_path, "letter").stderr
    assert check(tmp_path, "absent.key").exit_code == ExitCode.NOT_FOUND
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert init(elsewhere).exit_code == ExitCode.OK
    (tmp_path / "stranger.key").write_bytes((elsewhere / "one.key").read_bytes())
    assert check(tmp_path, "stranger.key").exit_code == ExitCode.NOT_FOUND


def test_a_store_that_is_missing_and_a_url_that_is_none_are_told_apart(tmp_path: Path) -> None:
    assert init(tmp_path).exit_code == ExitCode.OK
    key = tmp_path / "one.key"
    missing = run("vault", "check-key", "--store", f"file://{tmp_path}/nowhere", "--recovery-key", key)
    assert missing.exit_code == ExitCode.NOT_FOUND
    assert run("vault", "check-key", "--store", "ftp://x", "--recovery-key", key).exit_code == ExitCode.USAGE
    assert run("vault", "check-key", "--recovery-key", key).exit_code == ExitCode.USAGE
