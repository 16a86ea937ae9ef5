"""Commands: `python -m experiments.NAME --config=configs/x.py --config.key=value`."""
