"""The start of every experiment file.

    from configs import base

    def get_config():
        return base.experiment(name="x", train=TrainConfig(steps=10))

The result is a locked ConfigDict: a file may change fields after the call, never add one.
"""

import ml_collections

from kvattn.config import CheckpointConfig, Experiment, to_config_dict

SMOLLM2 = CheckpointConfig(path="smollm2")


def experiment(**fields) -> ml_collections.ConfigDict:
    """A locked ConfigDict of `Experiment(**fields)`; `workdir` defaults to workdirs/NAME.

    Raises TypeError for an unknown field. Validation comes with the command, after its overrides.
    """
    fields.setdefault("workdir", f"workdirs/{fields['name']}")
    return to_config_dict(Experiment(**fields))
