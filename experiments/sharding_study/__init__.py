"""The sharding study: predicted, compiled, measured."""
