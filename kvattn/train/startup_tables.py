"""The tables a training run starts with: mesh, parameters, KV ledger."""

import math
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from kvattn import account
from kvattn.config import Experiment
from kvattn.train.losses import Teacher
from kvattn.train.step import Layout


def show(layout: Layout, *, cfg: Experiment, start: int, workdir: str, teacher: Teacher | None) -> None:
    """Prints the start-up tables and one line that says what runs, from where, to where."""
    console = Console(width=None if Console().is_terminal else 120)
    for table in (mesh_table(layout, cfg), parameter_table(layout), account.ledger_table(layout.model, cfg.cache)):
        console.print(table)
    train = cfg.train
    parts = [f"{cfg.name or 'training'}: steps {start} to {train.steps}"]
    parts.append(f"{cfg.data.batch_size} x {cfg.data.seq_len} tokens a step of {cfg.data.source}")
    parts.append(f"{cfg.optimizer.name} {cfg.optimizer.schedule} {cfg.optimizer.learning_rate:g}")
    if teacher is not None:
        distil = train.distill
        parts.append(f"distilled (lm {distil.lm_weight:g}, kl {distil.logit_kl:g}, mse {distil.attention_mse:g})")
    parts.append(f"workdir {workdir}" if workdir else "no workdir")
    print(", ".join(parts) + "; the first step compiles", flush=True)


def mesh_table(layout: Layout, cfg: Experiment) -> Table:
    """Mesh axes, devices, and what each device gets of a batch."""
    mesh = layout.mesh
    table = Table(title="Mesh", title_justify="left")
    for name in (*mesh.axis_names, "devices", "kind", "processes", "rules", "rows a device", "accumulation"):
        table.add_column(name)
    micro = cfg.data.batch_size // cfg.train.accumulation
    table.add_row(
        *(str(mesh.shape[axis]) for axis in mesh.axis_names),
        str(mesh.size),
        mesh.devices.flat[0].device_kind,
        str(jax.process_count()),
        layout.rules_name,
        str(micro // layout.batch_shards),
        str(cfg.train.accumulation),
    )
    return table


def parameter_table(layout: Layout) -> Table:
    """Parameters by part, and the bytes of the float32 state (masters and optimizer) in all and a device."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(layout.abstract.params):
        part = _part(path)
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    total = sum(counts.values())
    table = Table(title="Parameters", title_justify="left")
    for name in ("part", "parameters", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part, count in counts.items():
        table.add_row(part, f"{count:,}", f"{100 * count / total:.1f}%")
    table.add_section()
    table.add_row("all", f"{total:,}", "100%")
    state = jax.tree.leaves(layout.abstract)
    whole = sum(x.size * x.dtype.itemsize for x in state)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state)
    table.caption = f"state {whole / 2**20:,.1f} MiB in all, {held / 2**20:,.1f} MiB a device"
    return table


def _part(path: Any) -> str:
    keys = [str(key.key) for key in path if hasattr(key, "key")]
    if keys[0] != "layers":
        return keys[0]
    return {"attn": "attention", "mlp": "mlp"}.get(keys[1], "norms")
