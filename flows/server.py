# SPDX-License-Identifier: Apache-2.0
"""Prefect's server for one machine: only the UI that stays on it, and writers that wait for each other.

python -m flows.server 127.0.0.1 4200        # `prefect server start` with these two changes
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import prefect
import uvicorn
from prefect.server.api.server import create_app
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


def leave_out_second_ui() -> None:
    """Serve no second UI (/v2): it asks amplitude.com for its configuration, whatever the settings on analytics say."""
    prefect.__ui_v2_static_path__ = Path(prefect.__ui_v2_static_path__) / "switched-off"


def queue_writers() -> None:
    """Begin SQLite's transactions as writers.

    Prefect reads first and writes later in one deferred transaction. SQLite refuses that write at once, whatever its
    timeout, if another one was committed in between: the UI's switch of a schedule is answered 503. A transaction that
    begins immediate waits for its turn, up to Prefect's 60 seconds.
    """
    begin = AioSqliteConfiguration.begin_transaction

    @asynccontextmanager
    async def begin_immediate(
        self: AioSqliteConfiguration,
        session: AsyncSession,
        with_for_update: bool = False,  # noqa: ARG001 - Prefect names it
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        async with begin(self, session, with_for_update=True) as transaction:
            yield transaction

    AioSqliteConfiguration.begin_transaction = begin_immediate  # type: ignore[method-assign]


def serve(host: str, port: int) -> None:
    """Serve until a signal ends the process."""
    leave_out_second_ui()
    queue_writers()
    uvicorn.run(create_app(final=True), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
