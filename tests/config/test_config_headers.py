"""What a config's header says is true of the command that it names, as far as no long run is needed to know."""

import json
import re
import shlex

import pytest

from experiments.common import cli
from experiments.common.commands import COMMANDS
from experiments.sharding_study import program
from kvattn import account
from tests.helpers.paths import ROOT

NAMES = cli.config_names()
TRAINERS = ("train", "uptrain", "study")
FIELD = re.compile(r"^(Command|Papers?|Hardware|Tokens|Minutes|Expect):\s*", re.MULTILINE)
STUDY = ROOT / "experiments" / "results" / "study_smollm2" / "results.jsonl"


def header(name):
    """{field: its text in one line}, of the header of configs/NAME.py; Command keeps its first command alone."""
    text = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    parts = FIELD.split(text)
    fields = dict(zip(parts[1::2], parts[2::2]))
    first = re.match(r"(.*\\\n)*.*", fields["Command"])[0].replace("\\\n", " ")
    fields = {field: " ".join(words.split()) for field, words in fields.items()}
    return fields | {"Command": re.sub(r"\s+\([^()]*\)$", "", " ".join(first.split()))}


def command(name):
    """(NAME of the experiment, its typed config), from the header's command as it stands."""
    words = shlex.split(header(name)["Command"])
    assert words[:2] == ["python", "-m"] and words[2].startswith("experiments.")
    experiment = words[2].removeprefix("experiments.")
    row = COMMANDS[experiment]
    files = [w.removeprefix("--config=").partition(":")[0] for w in words if w.startswith("--config=")] or [row.default]
    assert files == [f"configs/{name}.py"], "the command runs another config"
    return experiment, cli.parse([experiment, *words[3:]], default=row.default, shortcuts=row.shortcuts)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_command_is_legal_and_runs_this_config(name):
    experiment, _ = command(name)
    assert ("Tokens" in header(name)) == (experiment in TRAINERS)


@pytest.mark.parametrize("name", [n for n in NAMES if "Tokens" in header(n)])
def test_tokens_are_what_the_command_trains_on(name):
    _, cfg = command(name)
    steps, batch, length = cfg.train.steps, cfg.data.batch_size, cfg.data.seq_len
    assert header(name)["Tokens"].startswith(f"{steps * batch * length:,} = {steps} steps x {batch} x {length}")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_expected_names_its_run(name):
    """A record that is named exists; an expectation from another config's command says whose it is."""
    said = header(name)["Expect"]
    for path in re.findall(r"(?:experiments/results|configs|tests_peers)/[\w/]*\w(?:\.py)?", said):
        assert (ROOT / path).exists(), path
    records = re.findall(r"experiments/results/(\w+)", said)
    for other in (record for record in records if record != name):
        assert said.startswith("not run") and f"configs/{other}.py" in said


def test_figures_of_the_study_are_the_recorded_ones():
    records = [json.loads(line) for line in STUDY.read_text().splitlines()]
    found = {(r["phase"], r.get("row")): r for r in records}
    for name, row in (("uptrain_cla", "cla2"), ("uptrain_cla", "cla3"), ("uptrain_gqa", "mqa")):
        before, after = (f"{found[phase, row]['ppl']:,.0f}" for phase in ("before", "after"))
        assert re.search(rf"{before} to {after} \({row}\)", header(name)["Expect"])
    _, cfg = command("study_smollm2")
    tokens = {r["train_tokens"] for r in records if r["phase"] == "after"}
    assert tokens == {cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len} == {12_288}
    assert all("12,288 tokens" in header(name)["Expect"] for name in ("uptrain_cla", "uptrain_gqa"))
    assert f"perplexity {found['reference', None]['ppl']:.2f}" in header("evaluate_smollm2")["Expect"]
    written = [found["before", row.name]["kv_bytes_per_token"] for row in cfg.study.rows]
    assert f"(f32), exact: {', '.join(f'{n:.0f}' for n in written)}." in header("study_smollm2")["Expect"]


def test_bytes_and_padding_are_computed_ones():
    _, cfg = command("study_scratch")
    written = [account.kv_bytes_per_token(row.model, row.cache) for row in cfg.study.rows]
    assert f"exact: {', '.join(f'{n:.0f}' for n in written)}, with" in header("study_scratch")["Expect"]
    for name in ("sharding_layouts", "sharding_palm540b"):
        _, notes = program.padded(command(name)[1].sharding_study.rows[0].model, 64)
        assert notes == ("W 256128 -> 262144", "N 48 -> 64")
        assert all(note.partition(" ")[2] in header(name)["Expect"] for note in notes)
