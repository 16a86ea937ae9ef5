"""Places in the repository that commands name."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "experiments" / "results"
