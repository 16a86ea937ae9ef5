"""Tokenizers: ids against transformers (golden), SentencePiece against its own algorithm, files, templates."""

import dataclasses
import json
import shutil

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from kvattn import formats
from kvattn.config import ModelConfig
from kvattn.data import tokenizer
from kvattn.errors import UserError
from kvattn.formats import gguf_file
from tests.helpers import gguf_builder as build
from tests.helpers.paths import ROOT

GOLDEN = json.loads((ROOT / "tests" / "golden" / "tokenizers.json").read_text())
TEXTS = GOLDEN["texts"]
BPE, SPM = GOLDEN["bpe"], GOLDEN["spm"]
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"


def parsed(metadata):
    """Metadata as the GGUF parser gives it: lists of numbers are arrays."""
    is_numbers = lambda v: isinstance(v, list) and v and not isinstance(v[0], str)  # noqa: E731
    return {key: np.asarray(value) if is_numbers(value) else value for key, value in metadata.items()}


def bpe(pre="gpt-2", **extra):
    metadata = build.byte_level_keys(BPE["tokens"], BPE["merges"], pre, tuple(BPE["special"]))
    return parsed(metadata | {f"tokenizer.ggml.{k}": v for k, v in extra.items()})


def spm(**extra):
    metadata = build.sentencepiece_keys(SPM["tokens"], SPM["scores"], SPM["types"])
    return parsed(metadata | {f"tokenizer.ggml.{k}": v for k, v in extra.items()})


def chatty():
    """A byte-level tokenizer with every special token, two eos ids and a template."""
    fields = bpe("qwen2", bos_token_id=560, eos_token_id=562, eot_token_id=561, padding_token_id=560)
    return tokenizer.from_gguf(fields | {"tokenizer.chat_template": CHAT, "tokenizer.ggml.add_bos_token": True})


@pytest.fixture(scope="module")
def smollm2():
    return tokenizer.from_gguf(gguf_file.open_file(formats.smollm2_path()).fields)


# --- ids -----------------------------------------------------------------------------------------------


def test_smollm2_ids_are_the_published_ones(smollm2):
    assert [smollm2.encode(text) for text in TEXTS] == GOLDEN["smollm2"]["published"]
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_ids, smollm2.add_bos) == (49152, 1, (2,), False)
    assert (smollm2.pad_id, smollm2.unk_id) == (2, 0)


def test_smollm2_ids_are_transformers_ids(smollm2):
    """transformers 5.23 misses that `smollm` cuts digits off first; nothing else may differ."""
    differ = [t for t, want in zip(TEXTS, GOLDEN["smollm2"]["gguf"]) if smollm2.encode(t) != want]
    assert differ == ["12 345 6789 0.5 1e-9 x2y3 ½ ² ٣٤", "x    12"]


@pytest.mark.parametrize("pre", sorted(BPE["ids"]))
def test_byte_level_cuts(pre):
    t = tokenizer.from_gguf(bpe(pre))
    assert [t.encode(text, add_bos=False) for text in TEXTS] == BPE["ids"][pre]


def test_the_golden_cuts_differ():
    """The vocabulary is good enough to tell the pre-tokenizers apart."""
    different = [str(BPE["ids"][pre]) for pre in ("gpt-2", "llama-bpe", "qwen2", "smollm")]
    assert len(set(different)) == 4


def test_llama3_takes_whole_tokens_before_merging():
    """ignore_merges: 'abc' is a token, though the merges lead to 'a' + 'bc' only."""
    tokens = ["a", "b", "c", "bc", "abc"]
    fields = build.byte_level_keys(tokens, ["b c"], "llama-bpe")
    assert tokenizer.from_gguf(parsed(fields)).encode("abc", add_bos=False) == [4]
    fields["tokenizer.ggml.pre"] = "gpt-2"
    assert tokenizer.from_gguf(parsed(fields)).encode("abc", add_bos=False) == [0, 3]


def sentencepiece(text: str) -> list[int]:
    """SentencePiece BPE as llama.cpp runs it: join the neighbours whose union scores best, leftmost first."""
    ids = {token: i for i, token in enumerate(SPM["tokens"])}
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        unions = [a + b for a, b in zip(symbols, symbols[1:])]
        known = [(SPM["scores"][ids[union]], -i) for i, union in enumerate(unions) if union in ids]
        if not known:
            break
        at = -max(known)[1]
        symbols[at : at + 2] = [unions[at]]
    out: list[int] = []
    for symbol in symbols:
        out += [ids[symbol]] if symbol in ids else [ids[f"<0x{b:02X}>"] for b in symbol.encode()]
    return out


def test_sentencepiece_ids():
    t = tokenizer.from_gguf(spm())
    plain = [text for text in TEXTS if "<|" not in text]
    assert [t.encode(text, add_bos=False) for text in plain] == [sentencepiece(text) for text in plain]
    assert any(3 <= i < 259 for text in plain for i in t.encode(text, add_bos=False))  # bytes were needed
    agree = [(t.encode(text, add_bos=False), ids) for text, ids in zip(TEXTS, SPM["ids"]) if not text.startswith(" ")]
    assert len(agree) > 20 and all(ours == theirs for ours, theirs in agree)
    assert all(t.decode(t.encode(text, add_bos=False)) == text for text in TEXTS)
    assert t.encode("a") == [1, *t.encode("a", add_bos=False)]  # bos unless the file says no
    assert tokenizer.from_gguf(spm(add_bos_token=False)).encode("a") == t.encode("a", add_bos=False)
    bare = tokenizer.from_gguf(spm(add_space_prefix=False))
    assert bare.decode(bare.encode(" a")) == "<s> a" and bare.decode(bare.encode(" a"), skip_special=True) == " a"


def test_sentencepiece_without_byte_tokens_says_unknown():
    scores = [0.0, 0.0, 0.0, -1.0, -2.0]
    metadata = build.sentencepiece_keys(["<unk>", "<s>", "</s>", "▁", "a"], scores, [2, 3, 3, 1, 1])
    assert tokenizer.from_gguf(parsed(metadata)).encode("aéa") == [1, 3, 4, 0, 4]


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.text(max_size=60))
def test_byte_tokenizer(text):
    t = tokenizer.ByteTokenizer()
    assert t.encode(text) == list(text.encode()) and t.decode(t.encode(text)) == text
    assert t.encode(text, add_bos=True)[0] == t.bos_id == 256 and t.eos_ids == (257,) and t.vocab_size == 258


def test_byte_tokenizer_edges():
    t = tokenizer.ByteTokenizer()
    assert t.encode("a<|eos|>") == [97, 257] and t.decode([97, 257], skip_special=True) == "a"
    assert t.decode([0xE2, 0x82]) == "\ufffd"
    for bad in (-1, 258):
        with pytest.raises(UserError, match=f"token id {bad} is outside"):
            t.decode([97, bad])


def test_stream_gives_whole_characters(smollm2):
    text = "Naïve 日本語 🙂👩‍👩‍👧‍👦 end"
    for t in (smollm2, tokenizer.ByteTokenizer(), tokenizer.from_gguf(spm())):
        step = t.stream()
        pieces = [step(i) for i in t.encode(text, add_bos=False)]
        assert "".join(pieces).strip() == text and "\ufffd" not in "".join(pieces)
        assert "" in pieces  # a character of several bytes waited for its last


def test_special_tokens_and_bos():
    t = chatty()
    assert t.encode("<|im_end|>x")[:2] == [560, 562] and t.encode("x", add_bos=False)[0] != 560
    assert t.eos_ids == (562, 561)
    without = tokenizer.from_gguf(bpe())
    assert without.encode("x", add_bos=None) == without.encode("x", add_bos=False)
    with pytest.raises(UserError, match="no bos token"):
        without.encode("x", add_bos=True)


def test_user_defined_tokens_are_whole_but_plain():
    fields = bpe()
    fields["tokenizer.ggml.token_type"][561] = 4
    t = tokenizer.from_gguf(fields)
    assert t.encode("a<|im_start|>")[-1] == 561
    assert t.decode([561, 562], skip_special=True) == "<|im_start|>"


def test_check_matches(smollm2):
    tokenizer.check_matches(smollm2, ModelConfig(vocab_size=49152))
    with pytest.raises(UserError, match="49152 ids but the model only 49151"):
        tokenizer.check_matches(smollm2, ModelConfig(vocab_size=49151))


# --- refused metadata ----------------------------------------------------------------------------------

BROKEN = {
    "family": (bpe(model="bert"), "tokenizer.ggml.model 'bert'"),
    "cut": (bpe("unheard-of"), "tokenizer.ggml.pre 'unheard-of'"),
    "no merges": ({k: v for k, v in bpe().items() if not k.endswith("merges")}, "no tokenizer.ggml.merges"),
    "merge": (bpe(merges=["a b", "a\u0120b"]), "tokenizer.ggml.merges"),
    "merge of nothing": (bpe(merges=["zzz qqq"]), "'zzz qqq'"),
    "twice": (bpe(tokens=["a", "b", "a"]), "twice"),
    "types": (bpe(token_type=np.ones(3, np.int32)), "3 tokenizer.ggml.token_type"),
    "eos": (bpe(eos_token_id=563), "eos_token_id 563"),
    "eos type": (bpe(eos_token_id="x"), "an unusable tokenizer.ggml.eos_token_id"),
    "flag": (bpe(add_bos_token=3), "add_bos_token"),
    "scores": (spm(scores=np.ones(3, np.float32)), "tokenizer.ggml.scores"),
    "nan score": (spm(scores=np.full(len(SPM["tokens"]), np.nan)), "tokenizer.ggml.scores"),
    "long": (spm(tokens=["x" * 1025, *SPM["tokens"][1:]]), "1024 characters"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_metadata(case):
    fields, words = BROKEN[case]
    with pytest.raises(UserError) as caught:
        tokenizer.from_gguf(fields, source="x.gguf")
    message = str(caught.value)
    assert words in message and message.startswith("x.gguf") and message.endswith(".") and "\n" not in message


# --- directories ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chatty, lambda: tokenizer.from_gguf(spm()), tokenizer.ByteTokenizer])
def test_save_and_read_back(tmp_path, make):
    before = make()
    before.save(tmp_path / "new" / "folder")
    after = tokenizer.from_directory(tmp_path / "new" / "folder")
    for name in ("bos_id", "eos_ids", "pad_id", "unk_id", "add_bos", "chat_template", "vocab_size", "fingerprint"):
        assert getattr(after, name) == getattr(before, name), name
    assert [after.encode(text) for text in TEXTS] == [before.encode(text) for text in TEXTS]
    ids = before.encode(TEXTS[-3])
    assert after.decode(ids) == before.decode(ids)


def test_fingerprint_sees_every_change():
    base = chatty()
    changes = [{"bos_id": None}, {"eos_ids": (1,)}, {"add_bos": False}, {"chat_template": None}]
    others = [dataclasses.replace(base, **change) for change in changes]
    others += [tokenizer.from_gguf(bpe("gpt-2")), tokenizer.from_gguf(bpe("qwen2")), tokenizer.from_gguf(spm())]
    prints = [t.fingerprint for t in (base, *others)]
    assert len(set(prints)) == len(prints) and chatty().fingerprint == prints[0]
    assert tokenizer.from_gguf(bpe(merges=BPE["merges"][:-1])).fingerprint not in prints


def write_json(path, value):
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    """A directory with tokenizer.json alone."""
    chatty().save(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (tmp_path / name).unlink()
    return tmp_path


def test_special_tokens_from_each_file(folder):
    read = lambda: tokenizer.from_directory(folder)  # noqa: E731
    assert (read().bos_id, read().eos_ids, read().add_bos, read().chat_template) == (None, (), False, None)
    write_json(folder / "config.json", {"bos_token_id": 7, "eos_token_id": [8, 9]})
    assert (read().bos_id, read().eos_ids) == (7, (8, 9))
    write_json(folder / "generation_config.json", {"bos_token_id": 560, "eos_token_id": [561, 10]})
    assert (read().bos_id, read().eos_ids, read().add_bos) == (560, (561, 10), True)  # post-processor adds 560
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
    assert read().eos_ids == (562, 561, 10)
    write_json(folder / "tokenizer_config.json", {"bos_token": "<|im_end|>", "add_bos_token": False})
    assert (read().bos_id, read().add_bos) == (562, False)
    write_json(folder / "tokenizer_config.json", {"bos_token": "<|im_end|>", "add_bos_token": True})
    assert read().encode("") == [562]


def test_chat_template_from_each_file(folder):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert tokenizer.from_directory(folder).chat_template == "yes"
    (folder / "chat_template.jinja").write_text("newer")
    assert tokenizer.from_directory(folder).chat_template == "newer"


def test_broken_directories(folder):
    def refused(words):
        with pytest.raises(UserError) as caught:
            tokenizer.from_directory(folder)
        message = str(caught.value)
        assert words in message and str(folder) in message and message.endswith(".") and "\n" not in message

    write_json(folder / "generation_config.json", {"eos_token_id": 563})
    refused("eos id is 563")
    (folder / "generation_config.json").write_text("[1]")
    refused("generation_config.json is not a JSON object")
    (folder / "generation_config.json").write_text("{")
    refused("generation_config.json is not a JSON object")
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    refused("UTF-8")
    (folder / "tokenizer.json").write_text("{}")
    refused("no usable tokenizer")
    (folder / "tokenizer.json").unlink()
    refused("No such file")


SETTINGS = hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


PATCHES = st.binary(max_size=4) | st.sampled_from([b"[]", b"null", b'"', b"}", b"-1"])


@SETTINGS
@hypothesis.given(where=st.floats(0, 1), patch=PATCHES, cut=st.booleans())
def test_mutated_tokenizer_json(folder, where, patch, cut):
    """Refused, or read into something that encodes."""
    vocab = {"a": 0, "b": 1, "ab": 2, "<x>": 3}
    small = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")], unk_token="<x>"))
    small.add_special_tokens(["<x>"])
    whole = small.to_str().encode()
    at = int(where * len(whole))
    data = whole[:at] + patch + (b"" if cut else whole[at + len(patch) :])
    (folder / "tokenizer.json").write_bytes(data)
    try:
        assert isinstance(tokenizer.from_directory(folder).encode("abc"), list)
    except UserError as error:
        assert "\n" not in str(error)


def test_read_only_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        tokenizer.ByteTokenizer().save(tmp_path / "file")


# --- chat templates ------------------------------------------------------------------------------------


def test_chats_are_transformers_chats(smollm2):
    got = [smollm2.apply_chat(m, add_generation_prompt=p) for m in GOLDEN["messages"] for p in (False, True)]
    assert got == GOLDEN["smollm2"]["chats"]


def test_template_helpers():
    def render(template, messages=()):
        return dataclasses.replace(chatty(), chat_template=template).apply_chat(list(messages))

    assert chatty().apply_chat([{"role": "user", "content": "hi"}]) == "<|endoftext|>[user]hi<|im_end|>"
    loop = "{% for m in messages %}\n  {% if loop.index == 2 %}{% break %}{% endif %}\n{{ m|tojson }}\n{% endfor %}"
    assert render(loop, [{"a": "é<"}, {"b": 1}]) == '{"a": "é<"}\n'
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    bad = {
        "{{ raise_exception('roles must\nalternate') }}": "roles must alternate",
        "{% for %}": "chat template fails",
        "{{ messages.__class__.__mro__ }}": "chat template fails",
        "{{ messages.append(1) }}": "chat template fails",
        "{{ 1 / 0 }}": "division",
        "{{ messages[7].role.x }}": "chat template fails",
    }
    for template, words in bad.items():
        with pytest.raises(UserError, match=words):
            render(template)
    with pytest.raises(UserError, match="no chat template"):
        render(None)


@pytest.mark.peers
@pytest.mark.parametrize("make", [chatty, lambda: tokenizer.from_gguf(spm()), tokenizer.ByteTokenizer])
def test_transformers_loads_what_save_wrote(tmp_path, make):
    """Live: AutoTokenizer on the saved directory gives the same ids, special tokens and chat text."""
    transformers = pytest.importorskip("transformers")
    ours = make()
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, next(iter(ours.eos_ids)))
    assert theirs.decode(ours.encode(TEXTS[6])) == ours.decode(ours.encode(TEXTS[6]))
    if ours.chat_template:
        message = [{"role": "user", "content": "hi"}]
        assert theirs.apply_chat_template(message, tokenize=False) == ours.apply_chat(message)
    shutil.rmtree(tmp_path)
    theirs.save_pretrained(tmp_path)
    back = tokenizer.from_directory(tmp_path)
    assert [back.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert back.chat_template == ours.chat_template
