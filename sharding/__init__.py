"""Where arrays live: meshes, logical-axis rules and their application. Imports jax only."""

from sharding.apply import constrain, named, use_rules
from sharding.mesh import make_mesh
from sharding.rules import RULES, Rules, ShardingError

__all__ = ["RULES", "Rules", "ShardingError", "constrain", "make_mesh", "named", "use_rules"]
