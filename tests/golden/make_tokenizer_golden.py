"""Makes tokenizers.json: ids and chat texts of transformers for the GGUF tokenizers that the tests build.

    python -m tests.golden.make_tokenizer_golden        # transformers 5.23.0, Python 3.11

Of SmolLM2 two readings are kept: `gguf` is transformers' own of the GGUF file, which does not know the
pre-tokenizer name `smollm` and cuts as GPT-2 does; `published` cuts as the model's tokenizer.json and llama.cpp
do (every digit alone, then GPT-2). They differ where blanks stand before a digit and for digits like ½.
The small vocabularies are trained here on text in one piece, so that merges cross every boundary a
pre-tokenizer can draw and a wrong cut shows. transformers reads a SentencePiece GGUF without the blank that
SentencePiece and llama.cpp put in front of text that begins with a blank; the tests know.
"""

import dataclasses
import json
import os
import pathlib
import tempfile

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from kvattn import formats
from tests.helpers import gguf_builder as build

TEXTS = [
    "",
    " ",
    "Hello world",
    " leading",
    "trailing ",
    "a  b   c    d",
    "\n\n\ntext\r\n\ttabs\t\t\n  ",
    "\u00a0nbsp\u3000wide",
    "I'll, they've, it's, WE'LL, don't, I'M 'd 're",
    "12 345 6789 0.5 1e-9 x2y3 ½ ² ٣٤",
    "x    12",
    "if x == 1:\n    return 10\n",
    "def f(x: int) -> dict[str, int]:\n    return {'a': x ** 2}  # sq\n",
    "Grüße, naïve café — “quotes” … ÅÄÖ ﬁ",
    "日本語のテキスト。中文，한국어",
    "مرحبا بالعالم שלום नमस्ते",
    "🙂👩‍👩‍👧‍👦🇫🇷 e\u0301 \u200b zero",
    "!!!???...,,,;;;###$$$%%%^^^&&&***((()))",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "<|im_start|><|im_end|>x <|im_end",
    "http://a.b/c?d=e&f=g#h",
    "CamelCase snake_case kebab-case",
    "\\frac{1}{2} \\alpha_{i}^2",
    "To be, or not to be: that is the question:\nWhether 'tis nobler",
    "\x00\x01\x7f",
    "ab" * 40,
]
CORPUS = (
    " ".join(text for text in TEXTS if "<|" not in text) * 3
    + "the cat's 1234 hats, 56 of them; they'll sit\n\n  on 78 mats. " * 40
)
MESSAGES = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3\n"}],
]
PRES = ("gpt-2", "default", "llama-bpe", "qwen2")


def bpe_vocabulary() -> tuple[list[str], list[str]]:
    """Byte-level tokens and merges: 256 bytes and merges that ignore every word boundary."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        [CORPUS[i : i + 40] for i in range(0, len(CORPUS), 40)],
        trainers.BpeTrainer(vocab_size=560, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return [*tokens, "<|endoftext|>", "<|im_start|>", "<|im_end|>"], [" ".join(pair) for pair in model["merges"]]


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """SentencePiece-like tokens, scores and types: controls, bytes, characters and merges, best first."""
    trained = Tokenizer(models.BPE())
    text = "".join(c for c in CORPUS.replace(" ", "▁") if c < "\u0180" or c == "▁")  # the rest falls back to bytes
    trained.train_from_iterator(
        [text[i : i + 40] for i in range(0, len(text), 40)], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    merged = ["".join(pair) for pair in model["merges"]]
    letters = sorted(set(model["vocab"]) - set(merged))
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *merged, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(letters))]
    return tokens, scores, [2, 3, 3] + [6] * 256 + [1] * (len(merged) + len(letters))


def ids_of(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


def read(metadata: dict, cut=None) -> list[list[int]]:
    """Ids of TEXTS by transformers, from a GGUF file with this tokenizer, its pre-tokenizer replaced by `cut`."""
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(build.SMALL, d_model=60)  # transformers wants heads to divide it
        build.write(os.path.join(folder, "t.gguf"), build.keys(config) | metadata, {})
        theirs = AutoTokenizer.from_pretrained(folder, gguf_file="t.gguf")
        theirs.backend_tokenizer.pre_tokenizer = cut or theirs.backend_tokenizer.pre_tokenizer
        return ids_of(theirs)


def main() -> None:
    folder, name = os.path.split(formats.smollm2_path())
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    chats = [
        theirs.apply_chat_template(m, tokenize=False, add_generation_prompt=p) for m in MESSAGES for p in (False, True)
    ]
    smollm2 = {"gguf": ids_of(theirs), "chats": chats}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    smollm2["published"] = ids_of(theirs)
    assert isinstance(theirs.backend_tokenizer.decoder, decoders.ByteLevel)
    tokens, merges = bpe_vocabulary()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    bpe = {"tokens": tokens, "merges": merges, "special": special}
    bpe["ids"] = {pre: read(build.byte_level_keys(tokens, merges, pre, special)) for pre in PRES}
    digit = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")  # llama.cpp's two patterns for smollm
    metadata = build.byte_level_keys(tokens, merges, "gpt-2", special)
    bpe["ids"]["smollm"] = read(metadata, pre_tokenizers.Sequence([digit, byte_level]))
    pieces, scores, types = sentencepiece_vocabulary()
    spm = {"tokens": pieces, "scores": scores, "types": types}
    spm["ids"] = read(build.sentencepiece_keys(pieces, scores, types))
    golden = {"texts": TEXTS, "messages": MESSAGES, "smollm2": smollm2, "bpe": bpe, "spm": spm}
    out = pathlib.Path(__file__).with_name("tokenizers.json")
    out.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
