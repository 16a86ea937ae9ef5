"""What is predicted: a pass of a decoder over a torus of chips, before any compiler."""

from sharding.cost.prediction import *  # noqa: F403
from sharding.cost.prediction import LINKS
from sharding.cost.prediction import __all__ as _names

__all__ = [*_names, "LINKS"]
