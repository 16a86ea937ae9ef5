"""The training step and loop: losses and gradients against plain code, meshes, accumulation, signals of trouble."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import model
from kvattn.config import DataConfig, DistillConfig, Experiment, MeshConfig, OptimizerConfig, TrainConfig
from kvattn.errors import UserError
from kvattn.train import checkpoint, losses, metrics
from kvattn.train import loop as train
from kvattn.train import step as train_step
from kvattn.train.losses import Teacher
from sharding import make_mesh
from tests.helpers import tiny
from tests.helpers.tolerances import BF16_MODEL, EXACT, F32_GRAD, F32_OP, LOSS_SHARDED, close

T = 11
STUDENT = tiny.config(n_layers=2, d_model=24, d_ff=38, n_heads=4, n_k_heads=2, n_v_heads=2, vocab_size=62)
TEACHER = STUDENT.replace(n_k_heads=4, n_v_heads=4)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
DISTIL = DistillConfig(lm_weight=0.6, logit_kl=0.5, attention_mse=0.7, temperature=2.5)
TRAIN = TrainConfig(z_loss=1e-2, distill=DISTIL)


def random_batch(rng, *lead, vocab=62):
    """Packed rows: two segments, positions that restart, a fifth of the targets masked."""
    tokens = rng.integers(0, vocab, (*lead, T + 1)).astype(np.int32)
    cut = rng.integers(2, T - 2, (*lead, 1))
    index = np.broadcast_to(np.arange(T), (*lead, T))
    return {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "segment_ids": np.where(index < cut, 1, 2).astype(np.int32),
        "positions": np.where(index < cut, index, index - cut).astype(np.int32),
        "loss_mask": (rng.random((*lead, T)) < 0.8).astype(np.float32),
    }


def micro_batches(batch):
    return [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(batch["tokens"].shape[0])]


def layout_on(*mesh, cfg=STUDENT, steps=4):
    return train_step.make_layout(cfg, OPTIMIZER, steps, make_mesh(MeshConfig(*mesh)))


@pytest.fixture(scope="module")
def teacher():
    return Teacher(TEACHER, model.init(jax.random.key(7), TEACHER))


@pytest.fixture(scope="module")
def student():
    return model.init(jax.random.key(3), STUDENT)


# --- losses --------------------------------------------------------------------------------------------


def naive_loss(params, batch, teacher, train=TRAIN):
    """Every term from whole logits, written out once more."""
    inputs = model.Inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
    ours, _ = model.forward(params, STUDENT, inputs, collect=("attention",))
    theirs, _ = model.forward(teacher.params, TEACHER, inputs, collect=("attention",))
    mask, t = batch["loss_mask"], train.distill.temperature
    mean = lambda x: jnp.sum(x * mask) / jnp.sum(mask)  # noqa: E731
    lse = jnp.log(jnp.sum(jnp.exp(ours.logits), -1))
    ce = mean(lse - jnp.take_along_axis(ours.logits, batch["targets"][..., None], -1)[..., 0])
    p = jax.nn.softmax(theirs.logits / t)
    kl = t * t * mean(jnp.sum(p * jnp.log(p / jax.nn.softmax(ours.logits / t)), -1))
    pairs = zip(ours.collected["attention"], theirs.collected["attention"], strict=True)
    mse = jnp.stack([mean(jnp.mean((a - b) ** 2, -1)) for a, b in pairs]).mean()
    d = train.distill
    total = d.lm_weight * ce + train.z_loss * mean(lse**2) + d.logit_kl * kl + d.attention_mse * mse
    return total, {"ce": ce, "z": mean(lse**2), "kl": kl, "attention_mse": mse}


@pytest.mark.parametrize("chunk", [3, 4, T])
def test_chunked_loss_and_gradient_equal_whole_logits(chunk, student, teacher, rng, monkeypatch):
    """Chunks of 3 and 4 leave tails of 2 and 3 positions; gradients with respect to every parameter."""
    batch = jax.tree.map(jnp.asarray, random_batch(rng, 3))
    monkeypatch.setattr(losses, "LOGITS_CPU", chunk * 3 * 62)
    count = jnp.sum(batch["loss_mask"])
    loss = lambda p: losses.loss_and_metrics(p, STUDENT, TRAIN, batch, count, teacher=teacher)  # noqa: E731
    (got, parts), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    (want, whole), wanted = jax.jit(jax.value_and_grad(lambda p: naive_loss(p, batch, teacher), has_aux=True))(student)
    close(got, want, F32_OP)
    assert parts.keys() == whole.keys()
    for name in whole:
        assert whole[name] > 1e-4, name
        close(parts[name], whole[name], F32_OP, name)
    jax.tree.map(lambda g, w: close(g, w, F32_GRAD), grads, wanted)
    close(jax.jit(loss)(student)[0], want, F32_OP, "without gradient")


def test_distillation_gradient_by_hand(rng):
    """d/ds [t^2 KL(softmax(z/t) || softmax(s/t))] = t (softmax(s/t) - softmax(z/t)), in float64."""
    z, s = rng.normal(size=(2, 3, 5, 13)) * 3
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)  # noqa: E731
    kl = lambda s: losses.teacher_kl(jnp.asarray(z, jnp.float32), s, DISTIL).sum()  # noqa: E731
    got, gradient = jax.value_and_grad(kl)(jnp.asarray(s, jnp.float32))
    p, q = softmax(z / 2.5), softmax(s / 2.5)
    close(got, 2.5**2 * np.sum(p * np.log(p / q)), F32_OP)
    close(gradient, 2.5 * (q - p), F32_OP)


def test_a_student_equal_to_its_teacher_has_no_distillation_loss(teacher, rng):
    batch = jax.tree.map(jnp.asarray, random_batch(rng, 2))
    _, parts = losses.loss_and_metrics(teacher.params, TEACHER, TRAIN, batch, jnp.float32(9), teacher=teacher)
    close(parts["kl"], 0.0, F32_OP)
    close(parts["attention_mse"], 0.0, EXACT)


def test_the_teacher_gets_no_gradient(student, teacher, rng):
    batch = jax.tree.map(jnp.asarray, random_batch(rng, 2))

    def loss(taught):
        return losses.loss_and_metrics(
            student, STUDENT, TRAIN, batch, jnp.float32(9), teacher=Teacher(TEACHER, taught)
        )[0]

    for leaf in jax.tree.leaves(jax.grad(loss)(teacher.params)):
        close(leaf, np.zeros(leaf.shape), EXACT)


# --- the step ------------------------------------------------------------------------------------------


def run_steps(layout, batches, train_cfg, student, teacher=None):
    """(losses, grad norms, state) of the batches, leaves [A,B,T]."""
    step = train_step.make_step(layout, train_cfg, teacher=teacher.model if teacher else None)
    placed = None
    if teacher is not None:
        shardings = layout.params_of(teacher.model)
        placed = train_step.place(teacher.params, shardings, jnp.float32, copy=False)
    state, out = train_step.state_from(layout, student), []
    for batch in batches:
        state, values = step(state, placed, train_step.global_batch(layout, micro_batches(batch), (0, 1)))
        out.append((float(values["loss"]), float(values["grad_norm"])))
    return np.asarray(out), state


@pytest.fixture(scope="module")
def reference(student, teacher):
    rng = np.random.default_rng(11)
    batches = [random_batch(rng, 1, 16) for _ in range(4)]
    out, state = run_steps(layout_on(1, 1, 1), batches, TRAIN, student, teacher)
    return batches, out, jax.device_get(state.params)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_sharded_equals_unsharded(mesh, reference, student, teacher):
    """Losses and gradient norms of four steps, with a distilled loss and two micro-batches, on 8 devices."""
    batches, want, params = reference
    halves = [jax.tree.map(lambda x: x.reshape(2, 8, T), batch) for batch in batches]
    layout = layout_on(*mesh)
    got, state = run_steps(layout, halves, TRAIN, student, teacher)
    close(got, want, LOSS_SHARDED)
    assert want[0, 0] - want[-1, 0] > 0.01, "the losses must move for this to mean anything"
    moved = np.abs(params["embed"]["table"] - np.asarray(student["embed"]["table"])).max()
    assert moved > 1e-3
    jax.tree.map(lambda g, w: close(g, w, F32_GRAD), jax.device_get(state.params), params)
    up = state.params["layers"][1]["mlp"]["up"]
    assert up.sharding.shard_shape(up.shape) == (24 // mesh[1], 38 // mesh[2])
    moment = state.opt_state[1].mu["layers"][1]["mlp"]["up"]
    assert moment.sharding == up.sharding


def test_mqa_keeps_its_head_whole_on_a_tensor_mesh():
    mqa = STUDENT.replace(n_k_heads=1, n_v_heads=1)
    assert layout_on(2, 2, 2).rules_name == "fsdp_tp"
    layout = layout_on(2, 2, 2, cfg=mqa)
    assert layout.rules_name == "fsdp_tp_kv_replicated"
    assert layout.shardings.params["layers"][0]["attn"]["k"].spec[1] is None
    assert layout.shardings.params["layers"][0]["attn"]["q"].spec[1] == "tensor"


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(UserError, match="config.mesh"):
        layout_on(1, 1, 8)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_micro_batches_add_up_to_the_big_batch(accumulation, reference, student, teacher):
    batches, want, params = reference
    parts = [jax.tree.map(lambda x: x.reshape(accumulation, -1, T), batch) for batch in batches]
    counts = parts[0]["loss_mask"].sum((1, 2))
    assert len(set(counts.tolist())) > 1, "micro-batches must differ in unmasked tokens"
    got, state = run_steps(layout_on(1, 1, 1), parts, TRAIN, student, teacher)
    close(got, want, LOSS_SHARDED)
    jax.tree.map(lambda g, w: close(g, w, F32_GRAD), jax.device_get(state.params), params)


def test_the_state_is_donated_and_updated_in_place(student, rng):
    layout = layout_on(1, 1, 1)
    step = train_step.make_step(layout, TrainConfig())
    batch = train_step.global_batch(layout, micro_batches(random_batch(rng, 1, 4)), (0, 1))
    state = train_step.state_from(layout, student)
    compiled = step.lower(state, None, batch).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == size
    old = jax.tree.leaves(state)
    state, _ = step(state, None, batch)
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(student)), "the caller's parameters were copied"


def test_consumed_parameters_spare_the_teacher(rng):
    """A student that shares leaves with its teacher gives its own buffers away, never the teacher's."""
    params = model.init(jax.random.key(3), STUDENT)
    shared, own = params["embed"]["table"], params["layers"][1]["mlp"]["up"]
    layout = layout_on(1, 1, 1)
    state = train_step.state_from(layout, params, consume=True, keep={"embed": shared})
    step = train_step.make_step(layout, TrainConfig())
    step(state, None, train_step.global_batch(layout, micro_batches(random_batch(rng, 1, 4)), (0, 1)))
    assert own.is_deleted() and not shared.is_deleted()


def test_bfloat16_compute_keeps_float32_masters(student, teacher, reference):
    batches, want, _ = reference
    layout = layout_on(1, 1, 1)
    got, state = run_steps(layout, batches[:2], dataclasses.replace(TRAIN, compute_dtype="bfloat16"), student, teacher)
    close(got[:, 0], want[:2, 0], BF16_MODEL)
    assert np.abs(got - want[:2]).max() > 1e-6, "bfloat16 must differ from float32 somewhere"
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    update = np.asarray(state.params["embed"]["table"]) - np.asarray(student["embed"]["table"])
    assert np.unique(np.abs(update)).size > 100, "masters move by less than a bfloat16 step"


# --- the loop ------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(5)
    for i in range(6):
        words = rng.choice(["the ", "cat ", "sat ", "on ", "a ", "mat. ", "\n"], 700)
        (tmp_path / f"part{i}.txt").write_text("".join(words))
    return str(tmp_path / "*.txt")


def experiment(corpus, **changes):
    """A byte-level run of six steps on a generated corpus."""
    cfg = Experiment(
        name="tiny",
        model=dataclasses.replace(STUDENT, vocab_size=258),
        data=DataConfig(source="text_files", paths=(corpus,), tokenizer="bytes", batch_size=8, seq_len=32),
        optimizer=OPTIMIZER,
        train=TrainConfig(steps=6, log_every=2, checkpoint_every=3, accumulation=2, eval_every=4),
    )
    return dataclasses.replace(cfg, **changes)


def with_train(cfg, **changes):
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **changes))


def test_fit_writes_what_it_says_and_resumes(corpus, tmp_path, capsys):
    cfg, workdir = experiment(corpus), str(tmp_path / "run")
    seen = []
    whole = train.fit(cfg, workdir=workdir, on_step=lambda step, record: seen.append(step))
    printed = capsys.readouterr().out
    for mark in ("Mesh", "Parameters", "KV ledger", "step 2/6  loss", "tok/s", "mfu -", "mem "):
        assert mark in printed
    records = metrics.read_jsonl(tmp_path / "run" / metrics.JSONL)
    assert [r["step"] for r in records] == seen == list(range(1, 7))
    assert whole.losses == tuple(r["loss"] for r in records) and whole.losses[-1] < whole.losses[0]
    assert [r["step"] for r in records if "eval_loss" in r] == [4, 6]
    assert [r["step"] for r in records if "memory_bytes" in r] == [1, 2, 4, 6]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    again = train.fit(cfg, workdir=workdir, verbose=False)
    assert (again.step, again.losses) == (6, whole.losses)
    jax.tree.map(lambda a, b: close(a, b, EXACT), again.params, whole.params)

    short = str(tmp_path / "short")
    stopped = []

    def stop_after_four(step, record):
        if step == 4 and not stopped:
            stopped.append(True)
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError):
        train.fit(cfg, workdir=short, verbose=False, on_step=stop_after_four)
    resumed = train.fit(cfg, workdir=short, verbose=False)
    assert resumed.losses == whole.losses
    jax.tree.map(lambda a, b: close(a, b, EXACT), resumed.params, whole.params)
    evals = lambda d: [r.get("eval_loss") for r in metrics.read_jsonl(tmp_path / d / metrics.JSONL)]  # noqa: E731
    assert evals("run") == evals("short")


def test_a_mesh_may_change_between_runs(corpus, tmp_path):
    """Three steps on one device, the checkpoint resharded, three more on eight: as six on one."""
    constant = dataclasses.replace(OPTIMIZER, schedule="constant")
    cfg, workdir = with_train(experiment(corpus, optimizer=constant), eval_every=0), str(tmp_path / "run")
    train.fit(with_train(cfg, steps=3), workdir=workdir, verbose=False)
    resumed = train.fit(dataclasses.replace(cfg, mesh=MeshConfig(2, 2, 2)), workdir=workdir, verbose=False)
    alone = train.fit(cfg, verbose=False)
    assert len(resumed.losses) == 6
    close(resumed.losses, alone.losses, LOSS_SHARDED)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(corpus, tmp_path, monkeypatch):
    cfg, workdir = with_train(experiment(corpus), checkpoint_every=2, eval_every=0), str(tmp_path / "run")
    make_step = train_step.make_step

    def poisoned(layout, *args, **kwargs):
        inner = make_step(layout, *args, **kwargs)

        def step(state, teacher, batch):
            table = state.params["embed"]["table"]
            state.params["embed"]["table"] = jnp.where(state.step == 4, jnp.nan, table)
            return inner(state, teacher, batch)

        return step

    monkeypatch.setattr(train_step, "make_step", poisoned)
    with pytest.raises(UserError, match=r"loss is nan at step 5 \(the checkpoint of step 4 is intact\)"):
        train.fit(cfg, workdir=workdir, verbose=False)
    assert checkpoint.find_step(workdir).name == "4"
    assert len(metrics.read_jsonl(tmp_path / "run" / metrics.JSONL)) == 4
    params = checkpoint.load_model(workdir)[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_diverging_run_stops(corpus):
    wild = dataclasses.replace(OPTIMIZER, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(UserError, match="is (nan|inf) at step .*there is no checkpoint yet"):
        train.fit(experiment(corpus, optimizer=wild), verbose=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": MeshConfig(3, 3, 3)}, "27 devices"),
        ({"mesh": MeshConfig(data=8)}, "batch_size is 8"),
        ({"model": STUDENT}, "vocab"),
        ({"train": TrainConfig(distill=DistillConfig(logit_kl=1.0))}, "there is no teacher"),
        ({"data": DataConfig(source="mqar", mqar_vocab=512)}, "mqar_vocab is 512"),
        ({"data": DataConfig(source="text_files", paths=("/nowhere/*.txt",), tokenizer="bytes")}, "nowhere"),
        ({"data": DataConfig()}, "data.tokenizer"),
    ],
)
def test_what_does_not_fit_is_one_sentence(corpus, change, message):
    with pytest.raises(UserError, match=message) as error:
        train.fit(experiment(corpus, **change), verbose=False)
    assert "\n" not in str(error.value)


def test_teachers_that_do_not_fit(corpus, teacher):
    cfg = with_train(experiment(corpus), distill=DISTIL)
    with pytest.raises(UserError, match="one vocabulary"):
        train.fit(cfg, teacher=teacher, verbose=False)
    deep = dataclasses.replace(cfg.model, n_layers=3)
    with pytest.raises(UserError, match="layer by layer"):
        train.fit(cfg, teacher=Teacher(deep, None), verbose=False)


def test_parameters_of_another_model(corpus, student):
    with pytest.raises(UserError, match=r"embed.table is \(62, 24\) but config.model makes it \(258, 24\)"):
        train.fit(experiment(corpus), params=student, verbose=False)


def test_distilled_fit_from_given_parameters(corpus):
    """fit with a teacher: the student starts as the converted teacher and the KL falls."""
    cfg = with_train(experiment(corpus), distill=DistillConfig(0.0, 1.0, 1.0), steps=12, eval_every=0)
    wide = dataclasses.replace(TEACHER, vocab_size=258)
    taught = model.init(jax.random.key(1), wide)
    records = []
    result = train.fit(
        cfg,
        params=model.init(jax.random.key(2), cfg.model),
        model=cfg.model,
        teacher=(wide, taught),
        verbose=False,
        on_step=lambda step, record: records.append(record),
    )
    assert result.step == 12
    for name in ("kl", "attention_mse"):
        assert records[-1][name] < 0.9 * records[0][name], name
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(taught))


# --- records -------------------------------------------------------------------------------------------


def test_json_lines_drop_what_will_be_repeated_and_a_torn_tail(tmp_path):
    rows = [{"step": i, "loss": float(np.float32(1 / (i + 3)))} for i in range(1, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo'
    (tmp_path / metrics.JSONL).write_text(text)
    writer = metrics.JsonLines(tmp_path, resume_step=3)
    writer.write(4, {"loss": 0.5})
    writer.close()
    assert metrics.read_jsonl(tmp_path / metrics.JSONL) == [*rows[:3], {"step": 4, "loss": 0.5}]
    (tmp_path / metrics.JSONL).write_text("{broken\n" + text)
    with pytest.raises(UserError, match="line 1"):
        metrics.JsonLines(tmp_path, resume_step=3)


def test_console_line_is_pasteable():
    record = {"loss": 3.21544, "ce": 3.1, "learning_rate": 3e-4, "grad_norm": 0.914, "tokens_per_second": 4123.4}
    record |= {"mfu": 0.3812, "memory_bytes": 3 << 29, "left_seconds": 3725.0}
    assert metrics.console_line(20, 100, record) == (
        "step 20/100  loss 3.2154  ce 3.1000  lr 3.00e-04  gnorm 0.91  4,123 tok/s  mfu 38.1%  mem 1.50 GiB  "
        "left 1:02:05"
    )
