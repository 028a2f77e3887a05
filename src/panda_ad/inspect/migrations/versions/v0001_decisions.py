# SPDX-License-Identifier: Apache-2.0
"""Create the table of decisions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create it."""
    op.create_table(
        "panda_decisions",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("category", sa.String(200), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("label", sa.String(16), nullable=False),
        sa.Column("kind", sa.String(100), nullable=False),
        sa.Column("who", sa.String(100), nullable=False),
        sa.Column("at", sa.String(40), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("model", sa.String(250), nullable=False),
        sa.Column("version", sa.String(20), nullable=False),
        sa.Column("score", sa.Float(53), nullable=False),
        sa.Column("threshold", sa.Float(53), nullable=False),
        sa.Column("replaces", sa.Integer, nullable=False),
        sa.Column("undoes", sa.Integer, nullable=False),
        sa.UniqueConstraint("category", "sha256", "replaces", name="panda_decisions_in_turn"),
        sqlite_autoincrement=True,
    )
    op.create_index("panda_decisions_by_category", "panda_decisions", ["category", "id"])


def downgrade() -> None:
    """Drop it."""
    op.drop_table("panda_decisions")
