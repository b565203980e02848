"""Projects: who asked for a plan, lists by project; keys that expire. What was there belongs to the default project.

Revision ID: 0002
Revises: 0001
Create Date: 2026-11-23 05:05:00
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NEW_INDEXES = {
    "jobs": (["project", "created_at", "id"], ["project", "model", "created_at"], ["project", "state"]),
    "files": (["project", "created_at", "id"],),
    "profiles": (["project", "created_at", "id"], ["project", "model", "gpu"]),
}
OLD_INDEXES = {
    "jobs": (["created_at", "id"], ["model", "created_at"]),
    "files": (["created_at", "id"],),
    "profiles": (["created_at", "id"], ["model", "gpu"]),
    "plans": (["created_at", "id"],),
}


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "plan_uses",
        sa.Column("project", sa.String(length=256), nullable=False),
        sa.Column("plan_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["plan_id"], ["plans.id"], name=op.f("fk_plan_uses_plan_id_plans")),
        sa.PrimaryKeyConstraint("project", "plan_id", name=op.f("pk_plan_uses")),
    )
    op.create_index(op.f("ix_plan_uses_plan_id"), "plan_uses", ["plan_id"])
    op.create_index(op.f("ix_plan_uses_project_created_at_plan_id"), "plan_uses", ["project", "created_at", "plan_id"])
    op.execute("INSERT INTO plan_uses (project, plan_id, created_at) SELECT 'default', id, created_at FROM plans")
    _swap(OLD_INDEXES, NEW_INDEXES)


def downgrade() -> None:
    _swap(NEW_INDEXES, OLD_INDEXES)
    op.drop_table("plan_uses")
    op.drop_column("api_keys", "expires_at")


def _swap(old: dict, new: dict) -> None:
    for table, indexes in old.items():
        for columns in indexes:
            op.drop_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table_name=table)
    for table, indexes in new.items():
        for columns in indexes:
            op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, columns)
