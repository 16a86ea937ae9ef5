"""Tokenizers: one class over the `tokenizers` library, built from a directory, from GGUF metadata, or of bytes.

A GGUF file has no tokenizer.json; it names a family and lists tokens, merges or scores. The family decides
how text is cut before merging, and a wrong cut gives plausible wrong ids, so an unknown name raises.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from kvattn.config import ModelConfig
from kvattn.errors import UserError

_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back. `add_bos`: whether `encode` begins with bos_id unless told otherwise. `eos_ids`: every
    id that ends a text or a turn. Ids are below vocab_size. Build with from_directory, from_gguf, ByteTokenizer."""

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False
    chat_template: str | None = None

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of `text`; special tokens written out in it become their ids. Nothing is appended.

        Raises UserError for `add_bos=True` without a bos token.
        """
        ids = _guarded(lambda: self.backend.encode(text, add_special_tokens=False).ids, path="the checkpoint")
        if not (self.add_bos if add_bos is None else add_bos):
            return ids
        if self.bos_id is None:
            raise UserError("add_bos is True but the tokenizer has no bos token; use add_bos=False.")
        return [self.bos_id, *ids]

    def decode(self, ids: Any, skip_special: bool = False) -> str:
        """Text of `ids` (any sequence of ints). Incomplete UTF-8 becomes U+FFFD.

        Raises UserError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise UserError(f"token id {bad} is outside the tokenizer's vocabulary of {self.vocab_size}.")
        return _guarded(lambda: self.backend.decode(ids, skip_special_tokens=skip_special), path="the checkpoint")

    def stream(self, skip_special: bool = True) -> Callable[[int], str]:
        """A function from the next id to the text that it completes ('' inside a character)."""
        from tokenizers.decoders import DecodeStream

        state = DecodeStream(skip_special_tokens=skip_special)
        return lambda token: state.step(self.backend, int(token)) or ""

    def apply_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """`messages` ({'role': ..., 'content': ...}) as the text the model was tuned on, by the checkpoint's own
        template; encode it with add_bos=False, the template writes the bos token where it wants one.

        Raises UserError without a template, or when the template refuses the messages.
        """
        if self.chat_template is None:
            raise UserError("decode.chat is True but the checkpoint has no chat template; use decode.chat=False.")
        special = {"bos_token": self._text(self.bos_id), "eos_token": self._text(next(iter(self.eos_ids), None))}
        special |= {"pad_token": self._text(self.pad_id), "unk_token": self._text(self.unk_id)}
        return _render(self.chat_template, messages=messages, add_generation_prompt=add_generation_prompt, **special)

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.backend.id_to_token(token) or ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits over everything that decides what encode, decode and apply_chat return."""
        backend = json.loads(self.backend.to_str())
        for unused in ("post_processor", "truncation", "padding"):  # encode() never asks for these
            backend.pop(unused, None)
        parts = [backend, self.bos_id, sorted(self.eos_ids), self.add_bos, self.chat_template]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and generation_config.json;
        `from_directory` and transformers' AutoTokenizer read them."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        single = "$A"
        special = []
        if self.add_bos and self.bos_id is not None:
            single, special = "<bos> $A", [{"id": "<bos>", "ids": [self.bos_id], "tokens": [self._text(self.bos_id)]}]
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=special
        )
        ids = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        ids |= {"pad_token": self.pad_id, "unk_token": self.unk_id}
        names = {key: self._text(value) for key, value in ids.items() if value is not None}
        options = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        options |= names | ({"chat_template": self.chat_template} if self.chat_template else {})
        generation: dict[str, Any] = {} if self.bos_id is None else {"bos_token_id": self.bos_id}
        generation |= {"eos_token_id": list(self.eos_ids)} if self.eos_ids else {}
        generation |= {} if self.pad_id is None else {"pad_token_id": self.pad_id}
        texts = {"tokenizer.json": backend.to_str(pretty=True)}
        for name, value in zip(_FILES[:3], (options, names, generation), strict=True):
            texts[name] = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        try:
            epath.Path(folder).mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (epath.Path(folder) / name).write_bytes(text.encode())
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); choose another directory.") from None


def check_matches(tokenizer: Tokenizer, cfg: ModelConfig) -> None:
    """Raises UserError when the tokenizer can give an id for which the model has no embedding."""
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {cfg.vocab_size} embeddings "
            "(model.vocab_size), so they do not match; use the tokenizer of this checkpoint."
        )


def ByteTokenizer() -> Tokenizer:
    """UTF-8 bytes: id b is byte b, 256 begins a text and 257 ends it."""
    alphabet = _byte_alphabet()
    backend = tokenizers.Tokenizer(models.BPE(vocab={alphabet[b]: b for b in range(256)}, merges=[]))
    _byte_level(backend, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<|bos|>", "<|eos|>")])
    return Tokenizer(backend, bos_id=256, eos_ids=(257,))


# --- chat templates ------------------------------------------------------------------------------------


def _render(template: str, **context: Any) -> str:
    """A checkpoint's Jinja template, in a sandbox, with the helpers such templates expect."""
    import datetime

    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    try:
        return environment.from_string(template).render(**context)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's chat template fails on these messages ({reason}); change them.") from None


# --- directories ---------------------------------------------------------------------------------------


def from_directory(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or of `Tokenizer.save`.

    Special tokens come from tokenizer_config.json, then special_tokens_map.json; eos ids from
    generation_config.json as well; ids in config.json count where those say nothing. Raises UserError for a
    missing or damaged tokenizer.json.
    """
    folder = epath.Path(folder)
    path = folder / "tokenizer.json"
    try:
        backend = _guarded(tokenizers.Tokenizer.from_str, path.read_bytes().decode(), path=path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read ({reason}); save the tokenizer in its fast form there.") from None
    backend.no_truncation()
    backend.no_padding()
    options, names, generation, config = (_json(folder / name) for name in _FILES)

    def named(key: str) -> list[int]:
        for source in (options, names):
            value = source.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and backend.token_to_id(text) is not None:
                return [backend.token_to_id(text)]
        return []

    def by_id(key: str) -> list[int]:
        return _ids(generation.get(f"{key}_id")) or _ids(config.get(f"{key}_id"))

    first = {key: next(iter(named(key) or by_id(key)), None) for key in ("bos_token", "pad_token", "unk_token")}
    eos = named("eos_token")
    eos += _ids(generation.get("eos_token_id")) or ([] if eos else by_id("eos_token"))
    bos = first["bos_token"]
    add_bos = options.get("add_bos_token")
    if not isinstance(add_bos, bool):
        ids = _guarded(lambda: backend.encode("a", add_special_tokens=True).ids, path=path)
        add_bos = bos is not None and ids[:1] == [bos]
    tokenizer = Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys(eos)),
        pad_id=first["pad_token"],
        unk_id=first["unk_token"],
        add_bos=add_bos and bos is not None,
        chat_template=_template(folder, options),
    )
    _check_specials(tokenizer, path)
    return tokenizer


def _check_specials(tokenizer: Tokenizer, source: Any) -> None:
    for name, ids in (("bos", (tokenizer.bos_id,)), ("eos", tokenizer.eos_ids)):
        bad = next((i for i in ids if i is not None and not 0 <= i < tokenizer.vocab_size), None)
        if bad is not None:
            raise UserError(
                f"{source} has {tokenizer.vocab_size} tokens but the {name} id is {bad}, so the tokenizer does not "
                "match; take all its files from one checkpoint."
            )


def _json(path: epath.Path) -> dict[str, Any]:
    """A JSON object, {} when there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; download the checkpoint again.")
    return value


def _ids(value: Any) -> list[int]:
    """Token ids from an id, a list of ids, or nothing."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _template(folder: epath.Path, options: dict[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, or the (default) one in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{path} cannot be read as text; download the checkpoint again.") from None
    value = options.get("chat_template")
    if isinstance(value, list):
        value = next((v.get("template") for v in value if isinstance(v, dict) and v.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _guarded(build: Callable, *args: Any, path: Any) -> Any:
    """build(*args), where whatever the tokenizers library raises (even its panics) becomes one UserError."""
    try:
        return build(*args)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library's panics derive from BaseException
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} holds no usable tokenizer ({reason}); download the checkpoint again.") from None


# --- GGUF metadata -------------------------------------------------------------------------------------

_LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_CUT = _LLAMA3_CUT.replace(r"\p{N}{1,3}", r"\p{N}")
# tokenizer.ggml.pre -> how text is cut. "gpt2": GPT-2's pattern; "digits": each digit alone, then GPT-2's
# pattern; otherwise a pattern. `default` and a file that does not say are GPT-2's.
_CUTS = dict.fromkeys(("default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "roberta-bpe"), "gpt2")
_CUTS |= dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), "digits")
_CUTS |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3"), _LLAMA3_CUT)
_CUTS |= dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _QWEN2_CUT)
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_LONGEST = 1024  # characters in a SentencePiece token; the work to find its merges grows with the square


def from_gguf(fields: dict[str, Any], source: str = "the GGUF file") -> Tokenizer:
    """The tokenizer that GGUF metadata describes (`formats.gguf_file.File.fields`).

    tokenizer.ggml.model `gpt2` is byte-level BPE with merges; `llama` is SentencePiece BPE, where the pair
    whose union has the best score merges first and characters outside the vocabulary fall back to bytes.
    Control tokens are special, user-defined ones whole but plain. Raises UserError naming the key at fault.
    """
    get = functools.partial(_field, fields, source)
    kind, tokens = get("model", str), get("tokens", list)
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{source} has tokenizer.ggml.model {kind[:40]!r}; gpt2 and llama are read.")
    vocab = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(vocab) != len(tokens):
        raise UserError(f"{source} lists a token twice or none in tokenizer.ggml.tokens; convert the file again.")
    types = get("token_type", np.ndarray, np.ones(len(tokens), np.int32))
    if len(types) != len(tokens):
        raise UserError(f"{source} has {len(types)} tokenizer.ggml.token_type for {len(tokens)} tokens; convert again.")
    build = _byte_level_bpe if kind == "gpt2" else _sentencepiece
    backend = _guarded(build, vocab, get, source, path=source)
    added = [
        AddedToken(token, normalized=False, special=bool(t == _CONTROL))
        for token, t in zip(tokens, types.tolist(), strict=True)
        if t in (_CONTROL, _USER_DEFINED) and token
    ]
    backend.add_tokens(added)
    ids = {name: get(f"{name}_token_id", int, None) for name in ("bos", "eos", "eot", "padding", "unknown")}
    for name, value in ids.items():
        if value is not None and not 0 <= value < len(tokens):
            what = f"tokenizer.ggml.{name}_token_id {value} of {len(tokens)} tokens"
            raise UserError(f"{source} has {what}; convert the model to GGUF again.")
    starts = kind == "llama" or _CUTS.get(fields.get("tokenizer.ggml.pre", "")) == _LLAMA3_CUT
    template = fields.get("tokenizer.chat_template")
    return Tokenizer(
        backend=backend,
        bos_id=ids["bos"],
        eos_ids=tuple(dict.fromkeys(ids[n] for n in ("eos", "eot") if ids[n] is not None)),
        pad_id=ids["padding"],
        unk_id=ids["unknown"],
        add_bos=get("add_bos_token", bool, starts) and ids["bos"] is not None,
        chat_template=template if isinstance(template, str) else None,
    )


_REQUIRED = object()


def _field(fields: dict[str, Any], source: str, name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """tokenizer.ggml.`name`, of type `kind`."""
    value = fields.get(f"tokenizer.ggml.{name}", default)
    if value is default and default is not _REQUIRED:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        what = "no" if value is _REQUIRED else "an unusable"
        raise UserError(f"{source} has {what} tokenizer.ggml.{name}; convert the model to GGUF again.")
    return value


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def _byte_level(backend: tokenizers.Tokenizer, cut: Any) -> None:
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()


def _byte_level_bpe(vocab: dict[str, int], get: Callable, source: str) -> tokenizers.Tokenizer:
    pre = get("pre", str, "default")
    if pre not in _CUTS:
        raise UserError(f"{source} has tokenizer.ggml.pre {pre[:40]!r}, which is not known; known: {', '.join(_CUTS)}.")
    merges = _merges(vocab, get("merges", list), source)
    cut = _CUTS[pre]
    whole = cut == _LLAMA3_CUT  # Llama 3 takes a whole piece that is a token before it looks at merges
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if cut == "gpt2":
        _byte_level(backend, gpt2)
    elif cut == "digits":
        _byte_level(backend, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]))
    else:
        split = pre_tokenizers.Split(Regex(cut), behavior="isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        _byte_level(backend, pre_tokenizers.Sequence([split, rest]))
    return backend


def _merges(vocab: dict[str, int], lines: list[str], source: str) -> list[tuple[str, str]]:
    """'left right' lines as pairs, every part and every union a token."""
    pairs = [tuple(line.split(" ")) for line in lines]
    for line, pair in zip(lines, pairs, strict=True):
        if len(pair) != 2 or not {pair[0], pair[1], "".join(pair)} <= vocab.keys():
            what = f"{line[:40]!r} in tokenizer.ggml.merges, which joins no two tokens to a third"
            raise UserError(f"{source} has {what}; convert the model to GGUF again.")
    return pairs


def _sentencepiece(vocab: dict[str, int], get: Callable, source: str) -> tokenizers.Tokenizer:
    """BPE whose merge order is the score of the union (ties: earlier token first)."""
    scores = get("scores", np.ndarray)
    if len(scores) != len(vocab) or not np.isfinite(scores).all():
        raise UserError(f"{source} does not have one finite number per token in tokenizer.ggml.scores; convert again.")
    tokens = list(vocab)
    if max(map(len, tokens)) > _LONGEST:
        raise UserError(f"{source} has a token of over {_LONGEST} characters in tokenizer.ggml.tokens; convert again.")
    merges = []
    for i in np.argsort(-scores.astype(np.float64), kind="stable").tolist():
        token = tokens[i]
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
    unknown = get("unknown_token_id", int, None)
    model = models.BPE(
        vocab=vocab,
        merges=merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token=tokens[unknown] if unknown is not None and 0 <= unknown < len(tokens) else None,
    )
    backend = tokenizers.Tokenizer(model)
    prefix = get("add_space_prefix", bool, True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(joined + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return backend
