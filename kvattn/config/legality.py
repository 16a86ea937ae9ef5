"""Which configurations are legal. Every rule is here, once; `config.validate` runs them.

Each check raises UserError with one sentence: which field, which value, what to change.
"""

from typing import Any

from kvattn.errors import UserError

_POSITIVE = ("vocab_size", "d_model", "n_layers", "n_heads", "n_k_heads", "n_v_heads", "head_dim", "v_head_dim", "d_ff")
_CODES = ("int8", "int4", "float8_e4m3fn")
_CHOICES = {
    "qk_norm": ("none", "head", "full"),
    "norm": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post", "both"),
    "residual": ("serial", "parallel_palm", "parallel_neox", "ladder"),
    "mlp": ("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"),
    "remat": ("none", "dots", "full"),
}


def check(config: Any) -> None:
    """Raises UserError for the first illegal field of an Experiment or one of its parts."""
    _CHECKS.get(type(config).__name__, lambda c: None)(config)


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _choice(value: str, valid, field: str) -> None:
    _need(value in valid, f"{field} is {value!r}; choose one of {', '.join(valid)}.")


def _at_least(config: Any, section: str, **bounds: float) -> None:
    for name, low in bounds.items():
        value = getattr(config, name)
        _need(value >= low, f"{section}.{name} is {value}; it must be at least {low}.")


def check_model(c: Any) -> None:
    from kvattn.attention import VARIANTS
    from kvattn.attention.dispatch import KERNELS
    from kvattn.attention.step import DECODERS

    for name in _POSITIVE:
        _need(getattr(c, name) > 0, f"model.{name} is {getattr(c, name)}; it must be positive.")
    for name, valid in _CHOICES.items():
        _choice(getattr(c, name), valid, f"model.{name}")
    _choice(c.variant, tuple(VARIANTS), "model.variant")
    _choice(c.kernel, tuple(KERNELS), "model.kernel")
    _choice(c.decode_kernel, DECODERS, "model.decode_kernel")
    for name in ("n_k_heads", "n_v_heads"):
        heads = getattr(c, name)
        _need(c.n_heads % heads == 0, f"model.{name} is {heads}; it must divide model.n_heads = {c.n_heads}.")
    if c.tied_kv:
        same = (c.n_k_heads, c.head_dim) == (c.n_v_heads, c.v_head_dim)
        _need(
            same,
            f"model.tied_kv shares K as V but K is {c.n_k_heads}x{c.head_dim} and V {c.n_v_heads}x"
            f"{c.v_head_dim}; make n_v_heads and v_head_dim equal to K's.",
        )
    _need(
        c.residual in ("serial", "ladder") or c.norm_placement == "pre",
        f"model.norm_placement is {c.norm_placement!r} with residual {c.residual!r}; parallel blocks take pre.",
    )
    _need(
        not c.norm_offset or c.norm == "rmsnorm",
        f"model.norm_offset is {c.norm_offset} with norm {c.norm!r}; it applies to rmsnorm only.",
    )
    for name in ("attn_scale", "attn_soft_cap", "logit_soft_cap", "embed_scale", "norm_eps"):
        _need(getattr(c, name) >= 0, f"model.{name} is {getattr(c, name)}; it must not be negative.")
    _check_masks(c)
    _check_ropes(c)
    _check_sharing(c)
    if c.scan_layers:
        from kvattn.model import scan_period

        scan_period(c)
    reason = KERNELS[c.kernel].supports(c)
    _need(reason is None, f"model.kernel is {c.kernel!r}, which cannot serve this model: {reason}; use xla.")


def _check_sharing(c: Any) -> None:
    if not c.kv_source:
        return
    _need(
        len(c.kv_source) == c.n_layers,
        f"model.kv_source has {len(c.kv_source)} entries; it needs one per layer, {c.n_layers}.",
    )
    for layer, owner in enumerate(c.kv_source):
        _need(0 <= owner <= layer, f"model.kv_source[{layer}] is {owner}; a layer reads itself or an earlier layer.")
        _need(
            c.kv_source[owner] == owner,
            f"model.kv_source[{layer}] is {owner}, which owns nothing (it reads {c.kv_source[owner]}); "
            f"point it at {c.kv_source[owner]}.",
        )
        _need(
            c.rope(layer) == c.rope(owner),
            f"model.kv_source[{layer}] is {owner} but their ropes differ; shared keys are rotated once, so give "
            f"both layers the same entry of model.ropes.",
        )


def _check_masks(c: Any) -> None:
    _need(len(c.masks) > 0, "model.masks is (); it needs at least one entry.")
    for i, mask in enumerate(c.masks):
        _need(mask.window >= 0, f"model.masks[{i}].window is {mask.window}; use 0 for unlimited or a positive size.")
        _need(mask.sinks >= 0, f"model.masks[{i}].sinks is {mask.sinks}; it must not be negative.")
        _need(
            not mask.sinks or mask.window,
            f"model.masks[{i}].sinks is {mask.sinks} without a window; every token is visible already, set a window.",
        )


def _check_ropes(c: Any) -> None:
    from kvattn.config import ROPE_SCALINGS

    _need(len(c.ropes) > 0, "model.ropes is (); it needs at least one entry (None for no rotation).")
    for i, rope in enumerate(c.ropes):
        if rope is None:
            continue
        dim = rope.dim or c.head_dim
        _need(
            dim % 2 == 0 and 0 < dim <= c.head_dim,
            f"model.ropes[{i}].dim is {dim}; it must be even and at most head_dim = {c.head_dim}.",
        )
        _need(rope.theta > 0, f"model.ropes[{i}].theta is {rope.theta}; it must be positive.")
        _choice(rope.scaling, ROPE_SCALINGS, f"model.ropes[{i}].scaling")
        _need(rope.factor > 0, f"model.ropes[{i}].factor is {rope.factor}; it must be positive.")
        _need(
            rope.scaling in ("none", "linear") or rope.original_length > 0,
            f"model.ropes[{i}].original_length is {rope.original_length}; {rope.scaling} scaling needs the "
            "original context length.",
        )


def check_cache(c: Any) -> None:
    _need(len(c.kinds) > 0, "cache.kinds is (); it needs at least one entry.")
    for kind in c.kinds:
        _choice(kind, ("full", "ring", "by_mask", "paged"), "cache.kinds")
    _choice(c.dtype, ("float32", "bfloat16", *_CODES), "cache.dtype")
    _choice(c.key_scale, ("token", "channel"), "cache.key_scale")
    _choice(c.layout, ("rows", "lanes", "v_lanes"), "cache.layout")
    _need(c.capacity >= 0, f"cache.capacity is {c.capacity}; use 0 for what the command needs or a positive size.")
    _need(c.multiple >= 1, f"cache.multiple is {c.multiple}; slots are rounded up to it, give at least 1.")
    _need(
        c.page_size in (16, 32, 64, 128, 256), f"cache.page_size is {c.page_size}; choose one of 16, 32, 64, 128, 256."
    )
    _need(c.pages >= 0, f"cache.pages is {c.pages}; use 0 for as many as the batch needs or a positive number.")
    _need(c.pages == 0 or "paged" in c.kinds, f"cache.pages is {c.pages} but cache.kinds has no paged; set it to 0.")
    if c.key_scale == "channel":
        _need(
            c.dtype in _CODES,
            f"cache.key_scale is 'channel' with cache.dtype {c.dtype!r}, without scales; use {', '.join(_CODES)}.",
        )
        _need(
            "paged" not in c.kinds,
            "cache.key_scale is 'channel' with paged in cache.kinds; sequences share pages, a channel scale belongs "
            "to one of them, use token.",
        )


def check_model_cache(model: Any, cache: Any, capacity: int = 0) -> None:
    """Axes A, C, E x axis D: a ring needs a window in every reader of its owner, a layout of V needs a V, a decode
    kernel a store that it can read. `capacity`: tokens of a sequence, where they are known."""
    check_cache(cache)
    _need(
        not model.scan_layers,
        "model.scan_layers is True with a cache; scanned layers copy the cache, set scan_layers to False to decode.",
    )
    _need(
        not model.tied_kv or cache.layout != "v_lanes",
        "cache.layout is 'v_lanes' but model.tied_kv leaves no V of its own; use rows or lanes.",
    )
    _need(
        not model.tied_kv or cache.key_scale != "channel",
        "cache.key_scale is 'channel' but with model.tied_kv the key is also the value; use token.",
    )
    for owner in model.owners:
        if cache.kinds[owner % len(cache.kinds)] != "ring":
            continue
        for reader in model.readers(owner):
            _need(
                model.mask(reader).window > 0,
                f"cache.kinds gives layer {owner} a ring but layer {reader}, which reads it, has no window; "
                "use full or by_mask, or set model.masks.",
            )
    if model.decode_kernel != "xla":
        from kvattn.attention.step import reason_against

        reason = reason_against(model, cache, capacity)
        _need(
            reason is None,
            f"model.decode_kernel is {model.decode_kernel!r}, which cannot read this cache ("
            f"{(reason or '').rstrip('.')}); cache.multiple, page_size, dtype and layout decide.",
        )


def check_mesh(c: Any) -> None:
    _at_least(c, "mesh", data=1, fsdp=1, tensor=1)


def check_data(c: Any) -> None:
    _choice(c.source, ("shakespeare", "pystdlib", "text_files", "mqar"), "data.source")
    _choice(c.tokenizer, ("checkpoint", "bytes"), "data.tokenizer")
    _need(c.source != "text_files" or c.paths, "data.paths is (); source text_files needs globs in data.paths.")
    _need(0 < c.eval_fraction < 1, f"data.eval_fraction is {c.eval_fraction}; it must be between 0 and 1.")
    _at_least(c, "data", batch_size=1, seq_len=2)


def check_optimizer(c: Any) -> None:
    _choice(c.name, ("adamw", "adafactor"), "optimizer.name")
    _choice(c.schedule, ("cosine", "linear", "constant"), "optimizer.schedule")
    _need(c.learning_rate > 0, f"optimizer.learning_rate is {c.learning_rate}; it must be positive.")
    _at_least(c, "optimizer", warmup_steps=0, final_fraction=0, weight_decay=0, clip_norm=0)
    for name in ("beta1", "beta2"):
        _need(0 <= getattr(c, name) < 1, f"optimizer.{name} is {getattr(c, name)}; it must be in [0, 1).")


def check_train(c: Any) -> None:
    _choice(c.compute_dtype, ("float32", "bfloat16"), "train.compute_dtype")
    _at_least(c, "train", steps=0, accumulation=1, z_loss=0, log_every=1, checkpoint_every=1, keep=1, eval_every=0)
    d = c.distill
    _at_least(d, "train.distill", lm_weight=0, logit_kl=0, attention_mse=0)
    _need(d.temperature > 0, f"train.distill.temperature is {d.temperature}; it must be positive.")
    _need(
        d.lm_weight + d.logit_kl + d.attention_mse > 0,
        "train.distill has all weights 0, so there is no loss; set lm_weight to 1.",
    )


def check_decode(c: Any) -> None:
    _at_least(c, "decode", max_new_tokens=1, temperature=0, top_k=0, prefill_chunk=1)
    _need(0 < c.top_p <= 1, f"decode.top_p is {c.top_p}; it must be in (0, 1].")
    _need(0 <= c.min_p < 1, f"decode.min_p is {c.min_p}; it must be in [0, 1).")


def check_eval(c: Any) -> None:
    _at_least(c, "eval", context=2, stride=1, max_tokens=0)
    _need(c.stride <= c.context, f"eval.stride is {c.stride}; it must not exceed eval.context = {c.context}.")
    for depth in c.needle_depths:
        _need(0 <= depth <= 1, f"eval.needle_depths has {depth}; depths are fractions in [0, 1].")


def check_convert(c: Any) -> None:
    """One conversion step on its own; whether it fits a model shows when the model is known (convert.plan)."""
    from kvattn.convert.base import check as check_step

    check_step(c)


def check_study(c: Any) -> None:
    _at_least(c, "study", prompt_tokens=1, decode_tokens=1, decode_batch=1)


def check_sharding_study(c: Any) -> None:
    from kvattn.decode.partitioned import OVERLAPS
    from kvattn.int8_weights import WEIGHTS
    from sharding import cost

    known = tuple(w for w in WEIGHTS if w in cost.WEIGHT_BYTES)
    _choice(c.compile, ("none", "best", "all"), "sharding_study.compile")
    _choice(c.rank, cost.OVERLAPS, "sharding_study.rank")
    _choice(c.overlap, OVERLAPS, "sharding_study.overlap")
    _need(c.timeout > 0, f"sharding_study.timeout is {c.timeout}; it is seconds per program, above 0.")
    for name, least in (("batches", 1), ("contexts", 1), ("tokens", 0)):
        for value in getattr(c, name):
            _need(value >= least, f"sharding_study.{name} has {value}; it must be at least {least}.")
    for phase in (*c.phases, *(cell.phase for cell in c.cells)):
        _choice(phase, cost.PHASES, "sharding_study.phases")
    for weights in (*c.weights, *(cell.weights for cell in c.cells if cell.weights)):
        _choice(weights, known, "sharding_study.weights")
    names = [row.name for row in c.rows]
    for row in c.rows:
        _need(row.name != "", "sharding_study.rows has a row without a name; name it.")
        _need(names.count(row.name) == 1, f"sharding_study.rows has {row.name!r} twice; names must differ.")
        _need(
            not row.convert,
            f"sharding_study.rows {row.name!r} has convert; a layout needs no weights, give the model instead.",
        )
        check_cache(row.cache)
        if row.model is not None:
            check_model(row.model)
            check_model_cache(row.model, row.cache)
    for i, cell in enumerate(c.cells):
        _at_least(cell, f"sharding_study.cells[{i}]", batch=1, context=1, tokens=0, paper_seconds=0)
        _need(
            cell.tokens <= cell.context,
            f"sharding_study.cells[{i}].tokens is {cell.tokens}, above its context of {cell.context}.",
        )


def check_experiment(c: Any) -> None:
    check_model(c.model)
    for part in (c.mesh, c.data, c.optimizer, c.train, c.decode, c.eval, c.study, c.sharding_study):
        check(part)
    check_cache(c.cache)
    for step in (*c.convert, *(step for row in c.study.rows for step in row.convert)):
        check_convert(step)
    _need(
        c.data.batch_size % c.train.accumulation == 0,
        f"train.accumulation is {c.train.accumulation}; it must divide data.batch_size = {c.data.batch_size}.",
    )
    micro, shards = c.data.batch_size // c.train.accumulation, c.mesh.data * c.mesh.fsdp
    _need(
        micro % shards == 0,
        f"data.batch_size / train.accumulation is {micro}; it must be divisible by mesh.data x mesh.fsdp = {shards}.",
    )
    if not c.checkpoint.path and not c.convert and not c.model.scan_layers:
        check_model_cache(c.model, c.cache)
    _choice(c.checkpoint.dtype, ("float32", "bfloat16"), "checkpoint.dtype")
    names = [row.name for row in c.study.rows]
    for row in c.study.rows:
        _need(row.name != "", "study.rows has a row without a name; name it.")
        _need(names.count(row.name) == 1, f"study.rows has {row.name!r} twice; names must differ.")
        check_cache(row.cache)
        if row.model is not None:
            _need(
                not row.convert, f"study.rows {row.name!r} has both model and convert; a row from scratch takes model."
            )
            check_model(row.model)
            check_model_cache(row.model, row.cache)


_CHECKS = {
    "ModelConfig": check_model,
    "CacheConfig": check_cache,
    "ConvertConfig": check_convert,
    "MeshConfig": check_mesh,
    "DataConfig": check_data,
    "OptimizerConfig": check_optimizer,
    "TrainConfig": check_train,
    "DecodeConfig": check_decode,
    "EvalConfig": check_eval,
    "StudyConfig": check_study,
    "ShardingStudyConfig": check_sharding_study,
    "Experiment": check_experiment,
}
