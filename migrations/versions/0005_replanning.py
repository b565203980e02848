"""What an attempt that ran out of memory, or rose above its bounds, leaves on record.

Revision ID: 0005
Revises: 0004
Create Date: 2026-11-23 08:50:00
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("extra_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("num_out_of_memory", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("replan", sa.String(length=256), nullable=True))
    op.add_column("attempts", sa.Column("needed_bytes", sa.BigInteger(), nullable=True))
    op.add_column("attempts", sa.Column("bounds", sa.JSON(), nullable=True))
    op.add_column("attempts", sa.Column("drift_bytes", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    for name in ("drift_bytes", "bounds", "needed_bytes"):
        op.drop_column("attempts", name)
    for name in ("replan", "num_out_of_memory", "extra_bytes"):
        op.drop_column("jobs", name)
