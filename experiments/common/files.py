"""Files that flags name: --checkpoint, --tokens and --prompt_file in, --out out."""

import contextlib
import os
import sys
import uuid

import numpy as np

from kvattn.config import Experiment
from kvattn.data import corpora
from kvattn.errors import UserError


def check_checkpoint(cfg: Experiment, verb: str) -> None:
    """Raises UserError where no checkpoint is named to `verb`."""
    if not cfg.checkpoint.path:
        raise UserError(f"checkpoint.path is empty; name the checkpoint to {verb} with --checkpoint=PATH.")


def read_tokens(path: str) -> np.ndarray:
    """Integer ids [T] or [B,T] of a .npy file. Raises UserError: missing, not such a file, or another type."""
    if not path:
        raise UserError("--tokens is missing; give a .npy file of integer token ids [T] or [B,T].")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)  # a lying header allocates nothing
    except OSError as e:
        raise UserError(f"--tokens: {path} cannot be read ({e.strerror or e}); give a .npy file.") from e
    except (ValueError, EOFError) as e:
        raise UserError(f"--tokens: {path} is not a whole .npy file; write it with numpy.save.") from e
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        kind = getattr(ids, "dtype", "an archive")
        raise UserError(f"--tokens: {path} holds {kind}; give integer token ids.")
    if ids.ndim not in (1, 2) or not ids.size:
        raise UserError(f"--tokens: {path} has shape {ids.shape}; give [T] or [B,T], not empty.")
    return ids


def check_writable(path: str) -> None:
    """Raises UserError unless a file can be made at `path`, before any work is done for it."""
    folder = os.path.dirname(path) or "."
    if not path or os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--out is {path!r}, which cannot be written; give a file in a writable folder.")


def write_array(path: str, array: np.ndarray) -> None:
    """Writes a .npy file under a temporary name, then renames it: `path` is never half written.

    Raises UserError: the place cannot be written or is full; a file that was there stays.
    """
    check_writable(path)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as f:
            np.save(f, array)
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"--out: {path} cannot be written ({e.strerror or e}); make room or change it.") from e
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def read_prompt(file: str, given: str) -> str:
    """The prompt: the text of `file` (--prompt_file) if it is named, else `given` (--prompt), "-" standard input.

    Raises UserError: the file cannot be read, nothing is given.
    """
    text = corpora.read_text(file, "--prompt_file") if file else given
    text = sys.stdin.read() if text == "-" else text
    if not text:
        raise UserError("the prompt is empty; give one with --prompt, --prompt_file or on standard input.")
    return text
