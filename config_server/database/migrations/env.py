"""Alembic's entry: runs the migrations on the connection that `config_server.database.engine` hands over."""

from __future__ import annotations

from alembic import context

from config_server.database.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
