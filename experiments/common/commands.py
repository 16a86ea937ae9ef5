"""The table of commands: `python -m experiments.NAME`, with what each takes.

A command that takes a config has a row: its default config file, and shortcuts, flags that set one config field each.
A command without a config is None: its flags are its own. `cli.run` reads its row here, `experiments.launch` starts
any command that has one.
"""

from collections.abc import Mapping
from typing import NamedTuple

_DECODE = ("prompt", "chat", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "prefill_chunk")
_SHARDING = ("compile", "slices", "batches", "contexts", "phases", "tokens", "weights", "layouts", "meshes", "measure")


class Row(NamedTuple):
    """A command's default config file and its shortcuts: flag -> config field."""

    default: str
    shortcuts: Mapping[str, str] = {}


def _fields(group: str, names: tuple[str, ...]) -> dict[str, str]:
    return {name: f"{group}.{name}" for name in names}


COMMANDS: dict[str, Row | None] = {
    "decode": Row("configs/decode_smollm2.py", {**_fields("decode", _DECODE), "checkpoint": "checkpoint.path"}),
    "evaluate": Row(
        "configs/evaluate.py", {"checkpoint": "checkpoint.path", **_fields("eval", ("text", "context", "stride"))}
    ),
    "sharding_study": Row(
        "configs/sharding_study.py",
        {**_fields("sharding_study", _SHARDING), "workdir": "workdir", "variants": "variants"},
    ),
    "study": Row("configs/study_smollm2.py"),
    "train": Row("configs/train_tiny.py"),
    "uptrain": Row("configs/uptrain_gqa.py"),
    "bench_decode": None,
    "bench_kernels": None,
    "bench_load": None,
    "bench_train": None,
    "launch": None,
    "logits": None,
    "plan": None,
}
WITH_CONFIG = tuple(name for name, row in COMMANDS.items() if row is not None)
