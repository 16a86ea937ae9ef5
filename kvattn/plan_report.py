"""The former name of `sharding.cost.plan_report`, for importers that have not moved yet."""

from sharding.cost.plan_report import miss as _miss
from sharding.cost.plan_report import row

__all__ = ["_miss", "row"]
