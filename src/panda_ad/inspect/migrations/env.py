# SPDX-License-Identifier: Apache-2.0
"""Run by Alembic: brings the database of the connection that `decisions.open_decisions` gives it up to date."""

from alembic import context

from panda_ad.inspect.decisions import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
