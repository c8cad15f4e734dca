"""Opens the database, brings its schema up to date, and hands out transactions.

One writer at a time: a writing transaction holds the database from its first statement, so what it reads cannot change
under it. What `writing()` has left without an error survives power loss. The file is its owner's only: it holds what
proofs of join tokens are checked with.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import alembic.command
import alembic.config
import alembic.script
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from config_server.errors import DatabaseFault, DatabaseTooNew
from runtime.local_directory import FILE_MODE

BUSY_MILLISECONDS_MAX: Final = 10_000
READERS_MAX: Final = 8
_MIGRATIONS: Final = Path(__file__).parent / "migrations"


class Database:
    """An open database of the current schema. Made by `open_database`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._writer = asyncio.Lock()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A consistent view; nothing may be written. Raises DatabaseFault."""
        try:
            async with self._engine.connect() as connection:
                yield await connection.execution_options(is_read_only=True)
        except DBAPIError as error:
            raise DatabaseFault(reason=str(error.orig)) from error

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """All or nothing; durable when the block has ended without an error. Raises DatabaseFault."""
        try:
            async with self._writer, self._engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            raise DatabaseFault(reason=str(error.orig)) from error

    async def close(self) -> None:
        await self._engine.dispose()


async def open_database(path: Path) -> Database:
    """Opens or makes the SQLite database at `path` and runs the migrations that it lacks.

    Raises DatabaseTooNew if a newer program has been at it, DatabaseFault if it cannot be used.
    """
    await asyncio.get_running_loop().run_in_executor(None, _keep_private, path)
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}", pool_size=READERS_MAX, max_overflow=0)
    _attach_sqlite_rules(engine)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_migrate)
            await connection.commit()
    except DBAPIError as error:
        await engine.dispose()
        raise DatabaseFault(reason=str(error.orig)) from error
    except BaseException:
        await engine.dispose()
        raise
    return Database(engine)


def _keep_private(path: Path) -> None:
    """SQLite makes a new file as the umask says, and the two files beside it like the file itself."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            os.fchmod(descriptor, FILE_MODE)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DatabaseFault(reason=error.strerror) from error


def _attach_sqlite_rules(engine: AsyncEngine) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, record: object) -> None:
        # why: the driver's own implicit transactions would begin too late, after the first read
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout={BUSY_MILLISECONDS_MAX}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Connection) -> None:
        is_read_only = connection.get_execution_options().get("is_read_only", False)
        connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")


def _migrate(connection: Connection) -> None:
    configuration = alembic.config.Config()
    configuration.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    configuration.attributes["connection"] = connection
    scripts = alembic.script.ScriptDirectory.from_config(configuration)
    known = {script.revision for script in scripts.walk_revisions()}
    present = MigrationContext.configure(connection).get_current_revision()
    if present is not None and present not in known:
        raise DatabaseTooNew(revision=present, supported=scripts.get_current_head())
    alembic.command.upgrade(configuration, "head")
