"""The former name of `sharding.layout.torus_layouts`, for importers that have not moved yet."""

from sharding.layout.torus_layouts import *  # noqa: F403
