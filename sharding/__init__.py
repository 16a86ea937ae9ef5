"""Where arrays live: meshes, logical-axis rules, decode layouts and their application. Imports jax only."""

from sharding.layout.apply import (
    constrain,
    matmul,
    mean,
    merge_softmax,
    named,
    offset,
    once,
    one_chip,
    own_group,
    partitioned,
    per_chip,
    reduce,
    reshard,
    settle,
    take_rows,
    use_manual,
    use_rules,
    whole,
)
from sharding.layout.mesh import make_mesh
from sharding.layout.rules import RULES, Rules, ShardingError

__all__ = [
    "RULES",
    "Rules",
    "ShardingError",
    "constrain",
    "make_mesh",
    "matmul",
    "mean",
    "merge_softmax",
    "named",
    "offset",
    "once",
    "one_chip",
    "own_group",
    "partitioned",
    "per_chip",
    "reduce",
    "reshard",
    "settle",
    "take_rows",
    "use_manual",
    "use_rules",
    "whole",
]
