"""The frozen, hashable dataclasses that every function takes; past the door nothing sees a ConfigDict.

Letters (used in every docstring of the package): B batch, T query positions, S cache slots, D model width,
N query heads, K key heads, M value heads where they differ, G = N/K, H key dim, V value dim, R rotary dims,
F MLP width, L layers, W vocabulary.
"""

import dataclasses

from kvattn.config.legality import check

ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one layer, half-split ("NeoX") pairing: dim i pairs with i + R/2.

    `dim` is R, the number of leading head dims that rotate (0 = all H). Frequencies are
    `theta ** (-2 i / R)`, then scaled: `linear` divides by `factor`; `llama3` and `yarn` interpolate per
    frequency from `original_length` tokens; yarn also multiplies cos and sin by `attention_factor`
    (0 = the paper's 0.1 ln(factor) + 1).
    """

    theta: float = 10000.0
    dim: int = 0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True
    original_length: int = 0


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Axis C for one layer. A query at position p sees key position s <= p with p - s < window
    (0 = unlimited), or s < sinks (attention-sink tokens, arXiv 2309.17453)."""

    window: int = 0
    sinks: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder. `masks` and `ropes` are patterns: layer l uses entry l % len(pattern)."""

    # sizes
    vocab_size: int = 256  # W
    d_model: int = 64  # D
    n_layers: int = 2  # L
    n_heads: int = 4  # N
    n_k_heads: int = 4  # K
    n_v_heads: int = 4  # M
    head_dim: int = 16  # H
    v_head_dim: int = 16  # V
    d_ff: int = 256  # F
    max_length: int = 2048  # longest context the checkpoint was trained for; informative
    # axis A: projection; axis B: sharing; axis C: visibility
    variant: str = "heads"  # key of kvattn.attention.VARIANTS
    tied_kv: bool = False  # V is K before rotation: one cached leaf k[K,H]
    kv_source: tuple[int, ...] = ()  # owner of layer l's K, V; () = every layer its own
    kv_norm: bool = False  # CLA's separate norm in front of the owner's K/V projection
    masks: tuple[MaskConfig, ...] = (MaskConfig(),)
    ropes: tuple[RopeConfig | None, ...] = (RopeConfig(),)
    # attention details
    attn_scale: float = 0.0  # 0 = H ** -0.5
    attn_soft_cap: float = 0.0  # 0 = off; otherwise c * tanh(s / c) on scores
    qk_norm: str = "none"  # none | head (RMSNorm over H) | full (RMSNorm over all heads x H)
    qkv_bias: bool = False
    o_bias: bool = False
    # block
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma: scale is (1 + w)
    norm_placement: str = "pre"  # pre | post (OLMo 2) | both (Gemma 2/3)
    residual: str = "serial"  # serial | parallel_palm (one norm) | parallel_neox (two norms) | ladder
    mlp: str = "swiglu"  # swiglu | geglu | geglu_tanh | gelu | gelu_tanh
    mlp_bias: bool = False
    # ends
    tied_embeddings: bool = True
    embed_scale: float = 1.0  # Gemma: sqrt(D)
    logit_soft_cap: float = 0.0
    # execution
    kernel: str = "xla"  # axis E, a pass's own tokens (training, first prefill): xla | cudnn | splash | tokamax
    decode_kernel: str = "xla"  # axis E, up to 16 tokens over a cache: xla | mosaic_tpu | mosaic_gpu
    scan_layers: bool = False
    remat: str = "none"  # none | dots | full

    @property
    def sources(self) -> tuple[int, ...]:
        """kv_source with the default written out: sources[l] is the owner of layer l."""
        return self.kv_source or tuple(range(self.n_layers))

    @property
    def owners(self) -> tuple[int, ...]:
        """Layers that have K/V parameters and a cache, in order."""
        return tuple(layer for layer, owner in enumerate(self.sources) if layer == owner)

    def readers(self, owner: int) -> tuple[int, ...]:
        """Layers that attend to `owner`'s K and V, itself included."""
        return tuple(layer for layer, o in enumerate(self.sources) if o == owner)

    def mask(self, layer: int) -> MaskConfig:
        return self.masks[layer % len(self.masks)]

    def rope(self, layer: int) -> RopeConfig | None:
        return self.ropes[layer % len(self.ropes)]

    @property
    def scale(self) -> float:
        return self.attn_scale or self.head_dim**-0.5


EXECUTION = ("kernel", "decode_kernel", "remat")  # how a model is computed, not what: config.model's for any checkpoint


def executed(model: ModelConfig, like: ModelConfig) -> ModelConfig:
    """`model` (of a checkpoint) with the execution fields of `like` (config.model). Raises UserError where they cannot
    serve it."""
    model = dataclasses.replace(model, **{name: getattr(like, name) for name in EXECUTION})
    check(model)
    return model


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Axis D. `kinds` is a pattern over layers (the owner's entry counts): full | ring | by_mask | paged.

    `ring` holds the widest reader's window plus its sinks and needs every reader of the owner to be windowed;
    `by_mask` is ring where that holds and full elsewhere; `paged` holds pages of `page_size` tokens, given out by a
    table, from a pool of `pages` per owner layer (0 = enough for every sequence at capacity).

    int8, int4 and float8_e4m3fn are codes with float32 scales: one a token and head, or with key_scale "channel" one a
    key channel, fixed by a sequence's first tokens (kvattn/cache/quantized.py). `layout` "lanes" holds K and V as
    [dim, S], "v_lanes" V only. Slots of full and ring stores are rounded up to a multiple of `multiple`.
    """

    kinds: tuple[str, ...] = ("full",)
    dtype: str = "float32"  # float32 | bfloat16 | int8 | int4 | float8_e4m3fn
    capacity: int = 0  # tokens per sequence; 0 = what the command needs (prompt + new tokens)
    key_scale: str = "token"  # token | channel (codes only)
    layout: str = "rows"  # rows | lanes | v_lanes
    multiple: int = 1
    page_size: int = 64  # P: 16, 32, 64, 128 or 256
    pages: int = 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Where the weights come from. `path`: smollm2 (the embedded GGUF), a Hugging Face directory, a .gguf
    file or a kvattn checkpoint directory; empty = random weights of `model`."""

    path: str = ""
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """One conversion step; `kind` is a key of kvattn.convert.CONVERSIONS, fields it ignores must stay default."""

    kind: str = ""  # gqa | cla | mlkv | window
    k_heads: int = 0
    v_heads: int = 0  # 0 = k_heads
    method: str = "mean"  # gqa: mean | first | random; cla/mlkv: mean | running | first
    factor: int = 0  # cla: layers per group
    owners: int = 0  # mlkv: number of owner layers
    window: int = 0
    sinks: int = 0
    keep_every: int = 0  # window: every n-th layer keeps its full view (0 = none)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Training and pjit-decode mesh; the product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`source`: shakespeare | pystdlib | text_files (with `paths`, globs) | mqar (synthetic recall)."""

    source: str = "shakespeare"
    paths: tuple[str, ...] = ()
    eval_fraction: float = 0.1
    batch_size: int = 8  # sequences per optimizer step, all processes and accumulation included
    seq_len: int = 256  # T
    seed: int = 0
    tokenizer: str = "checkpoint"  # checkpoint | bytes
    mqar_pairs: int = 0  # source mqar: key-value pairs per sequence; 0 = seq_len / 16
    mqar_vocab: int = 8192  # source mqar: vocabulary drawn from; at most the model's


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # adamw | adafactor
    learning_rate: float = 3e-4
    schedule: str = "cosine"  # cosine | linear | constant
    warmup_steps: int = 0
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Teacher = the unconverted checkpoint. loss = lm_weight * CE + logit_kl * KL(teacher || student)
    + attention_mse * mean over layers of MSE(attention output)."""

    lm_weight: float = 1.0
    logit_kl: float = 0.0
    attention_mse: float = 0.0
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    accumulation: int = 1
    compute_dtype: str = "float32"  # float32 | bfloat16; master weights stay float32
    z_loss: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 50
    keep: int = 2
    eval_every: int = 0
    distill: DistillConfig = DistillConfig()  # the default is the plain LM loss


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    prompt: str = ""
    chat: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    prefill_chunk: int = 512


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    text: str = ""  # a file; empty = the held-out plays
    context: int = 512
    stride: int = 256
    max_tokens: int = 0  # 0 = the whole text
    needle_lengths: tuple[int, ...] = ()
    needle_depths: tuple[float, ...] = (0.0, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class VariantConfig:
    """A row of a study: a name, the conversions that make it from the checkpoint, and its cache.

    With `model` set (a study from scratch) the row is that model, and `convert` must be empty.
    """

    name: str = ""
    convert: tuple[ConvertConfig, ...] = ()
    cache: CacheConfig = CacheConfig()
    model: ModelConfig | None = None


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Rows to compare. `prompt_tokens` of held-out text are continued by `decode_tokens` in each row.
    `keep_models` keeps every row's trained checkpoint (weights and optimizer state) in the workdir."""

    rows: tuple[VariantConfig, ...] = ()
    prompt_tokens: int = 64
    decode_tokens: int = 32
    decode_batch: int = 1
    keep_models: bool = False


@dataclasses.dataclass(frozen=True)
class ShardingCellConfig:
    """One question of a sharding study beside its product of slices, batches, contexts and phases, and the paper's
    answer where there is one. Empty: `variant` = every row, `slice` = every slice of the study, `weights` = all of
    them; `tokens` of each sequence in a prefill, 0 = context."""

    phase: str = "decode"  # prefill | decode
    batch: int = 1
    context: int = 2048
    tokens: int = 0
    variant: str = ""
    slice: str = ""
    weights: str = ""
    paper_layout: str = ""  # e.g. ws_2d/by_batch:xyz
    paper_seconds: float = 0.0  # of the pass, measured
    paper_source: str = ""


@dataclasses.dataclass(frozen=True)
class ShardingStudyConfig:
    """Layouts to compare: rows x slices x batches x contexts x phases x weights, and `cells`.

    `rows`: a name, a model (None = config.model) and a cache each; () = config.model with config.cache. `layouts` ()
    = all of the planner's; `meshes`: XxYxZ or `default` (the paper's for the chip count), () = for every layout its
    best one and the default. `tokens` of each sequence in a prefill, () = the context. `rank`: overlap assumed in
    sorting (sharding.cost.prediction.OVERLAPS); `overlap`: of the program that is compiled
    (kvattn.decode.partitioned.OVERLAPS)."""

    rows: tuple[VariantConfig, ...] = ()
    slices: tuple[str, ...] = ("v4:2x2x2",)
    batches: tuple[int, ...] = (64,)
    contexts: tuple[int, ...] = (2048,)
    phases: tuple[str, ...] = ("decode",)
    tokens: tuple[int, ...] = ()
    weights: tuple[str, ...] = ("bfloat16",)
    cells: tuple[ShardingCellConfig, ...] = ()
    layouts: tuple[str, ...] = ()
    meshes: tuple[str, ...] = ()
    rank: str = "full"
    overlap: str = "none"
    compile: str = "best"  # none | best | all
    measure: bool = True
    timeout: float = 300.0  # seconds per program compiled


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything one command needs."""

    name: str = ""
    seed: int = 0
    workdir: str = ""
    model: ModelConfig = ModelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    convert: tuple[ConvertConfig, ...] = ()
    cache: CacheConfig = CacheConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
    eval: EvalConfig = EvalConfig()
    study: StudyConfig = StudyConfig()
    sharding_study: ShardingStudyConfig = ShardingStudyConfig()
    steps: int = -1  # shortcut: overrides train.steps when >= 0
    variants: tuple[str, ...] = ()  # shortcut: only these rows of study.rows (sharding_study.rows), by name
