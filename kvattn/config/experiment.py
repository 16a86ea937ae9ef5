"""Everything one command needs, as frozen dataclasses: data, training, decoding, evaluation, studies, `Experiment`."""

import dataclasses
import math

from kvattn.config.cache import CacheConfig
from kvattn.config.check import at_least, choice, need
from kvattn.config.model import ModelConfig
from kvattn.config.tagged import Tagged

PHASES = ("prefill", "decode")
STUDY_WEIGHTS = ("bfloat16", "int8")  # in which a sharding study holds weights


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Where the weights come from. `path`: smollm2 (the embedded GGUF), a Hugging Face directory, a .gguf
    file or a kvattn checkpoint directory; empty = random weights of `model`."""

    path: str = ""
    dtype: str = "float32"

    def check(self) -> None:
        """Raises UserError for a dtype that weights are not read in."""
        choice(self.dtype, ("float32", "bfloat16"), "checkpoint.dtype")


class Conversion(Tagged, root="kind"):
    """Root of every conversion's config; kvattn.convert.base.Method says what a conversion must provide."""

    def check(self) -> None:
        """Raises UserError for the first illegal field."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Training and pjit-decode mesh; the product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def check(self) -> None:
        """Raises UserError for an axis below 1."""
        at_least(self, "mesh", data=1, fsdp=1, tensor=1)


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

    def check(self) -> None:
        """Raises UserError for the first illegal field."""
        choice(self.source, ("shakespeare", "pystdlib", "text_files", "mqar"), "data.source")
        choice(self.tokenizer, ("checkpoint", "bytes"), "data.tokenizer")
        need(
            self.source != "text_files" or bool(self.paths),
            "data.paths is (); source text_files needs globs in data.paths.",
        )
        need(0 < self.eval_fraction < 1, f"data.eval_fraction is {self.eval_fraction}; it must be between 0 and 1.")
        at_least(self, "data", batch_size=1, seq_len=2)


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

    def check(self) -> None:
        """Raises UserError for the first illegal field."""
        choice(self.name, ("adamw", "adafactor"), "optimizer.name")
        choice(self.schedule, ("cosine", "linear", "constant"), "optimizer.schedule")
        need(
            0 < self.learning_rate < math.inf, f"optimizer.learning_rate is {self.learning_rate}; it must be positive."
        )
        at_least(self, "optimizer", warmup_steps=0, final_fraction=0, weight_decay=0, clip_norm=0)
        for name in ("beta1", "beta2"):
            need(0 <= getattr(self, name) < 1, f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1).")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Teacher = the unconverted checkpoint. loss = lm_weight * CE + logit_kl * KL(teacher || student)
    + attention_mse * mean over layers of MSE(attention output)."""

    lm_weight: float = 1.0
    logit_kl: float = 0.0
    attention_mse: float = 0.0
    temperature: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss has a distillation term."""
        return bool(self.logit_kl or self.attention_mse)

    def check(self) -> None:
        """Raises UserError for a negative weight, or none at all."""
        at_least(self, "train.distill", lm_weight=0, logit_kl=0, attention_mse=0)
        need(0 < self.temperature < math.inf, f"train.distill.temperature is {self.temperature}; it must be positive.")
        need(
            self.lm_weight + self.logit_kl + self.attention_mse > 0,
            "train.distill has all weights 0, so there is no loss; set lm_weight to 1.",
        )


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

    def check(self) -> None:
        """Raises UserError for the first illegal field."""
        choice(self.compute_dtype, ("float32", "bfloat16"), "train.compute_dtype")
        at_least(
            self, "train", steps=0, accumulation=1, z_loss=0, log_every=1, checkpoint_every=1, keep=1, eval_every=0
        )
        self.distill.check()


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

    def check(self) -> None:
        """Raises UserError for the first illegal field."""
        at_least(self, "decode", max_new_tokens=1, temperature=0, top_k=0, prefill_chunk=1)
        need(0 < self.top_p <= 1, f"decode.top_p is {self.top_p}; it must be in (0, 1].")
        need(0 <= self.min_p < 1, f"decode.min_p is {self.min_p}; it must be in [0, 1).")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    text: str = ""  # a file; empty = the held-out plays
    context: int = 512
    stride: int = 256
    max_tokens: int = 0  # 0 = the whole text
    needle_lengths: tuple[int, ...] = ()
    needle_depths: tuple[float, ...] = (0.0, 0.5, 1.0)

    def check(self) -> None:
        """Raises UserError for the first illegal field."""
        at_least(self, "eval", context=2, stride=1, max_tokens=0)
        need(
            self.stride <= self.context,
            f"eval.stride is {self.stride}; it must not exceed eval.context = {self.context}.",
        )
        for depth in self.needle_depths:
            need(0 <= depth <= 1, f"eval.needle_depths has {depth}; depths are fractions in [0, 1].")


@dataclasses.dataclass(frozen=True)
class VariantConfig:
    """A row of a study: a name, the conversions that make it from the checkpoint, and its cache.

    With `model` set (a study from scratch) the row is that model, and `convert` must be empty.
    """

    name: str = ""
    convert: tuple[Conversion, ...] = ()
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

    def check(self) -> None:
        """Raises UserError: sizes below 1, rows without a name or with one name, a row of two origins."""
        at_least(self, "study", prompt_tokens=1, decode_tokens=1, decode_batch=1)
        check_rows(self.rows, "study.rows")
        for row in self.rows:
            for step in row.convert:
                step.check()
            need(
                row.model is None or not row.convert,
                f"study.rows {row.name!r} has both model and convert; a row from scratch takes model.",
            )


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

    def check(self, where: str) -> None:
        """Raises UserError for the first illegal field."""
        choice(self.phase, PHASES, f"{where}.phase")
        at_least(self, where, batch=1, context=1, tokens=0, paper_seconds=0)
        need(self.tokens <= self.context, f"{where}.tokens is {self.tokens}, above its context of {self.context}.")
        need(
            not self.weights or self.weights in STUDY_WEIGHTS,
            f"{where}.weights is {self.weights!r}; choose one of {', '.join(STUDY_WEIGHTS)}.",
        )


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

    def check(self) -> None:
        """Raises UserError for the first illegal field."""
        choice(self.compile, ("none", "best", "all"), "sharding_study.compile")
        choice(self.rank, ("full", "memory", "none"), "sharding_study.rank")
        choice(self.overlap, ("none", "one_way", "two_way", "compiler"), "sharding_study.overlap")
        need(
            0 < self.timeout < math.inf,
            f"sharding_study.timeout is {self.timeout}; it is seconds per program, above 0.",
        )
        for name, least in (("batches", 1), ("contexts", 1), ("tokens", 0)):
            for value in getattr(self, name):
                need(value >= least, f"sharding_study.{name} has {value}; it must be at least {least}.")
        for phase in self.phases:
            choice(phase, PHASES, "sharding_study.phases")
        for weights in self.weights:
            choice(weights, STUDY_WEIGHTS, "sharding_study.weights")
        check_rows(self.rows, "sharding_study.rows")
        for row in self.rows:
            need(
                not row.convert,
                f"sharding_study.rows {row.name!r} has convert; a layout needs no weights, give the model instead.",
            )
        for i, cell in enumerate(self.cells):
            cell.check(f"sharding_study.cells[{i}]")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything one command needs."""

    name: str = ""
    seed: int = 0
    workdir: str = ""
    model: ModelConfig = ModelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    convert: tuple[Conversion, ...] = ()
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

    def check(self) -> None:
        """Raises UserError for the first illegal field or combination. What a kernel or a store can serve is asked
        where it is chosen (kvattn.attention.gate, kvattn.cache.check_store)."""
        for field in dataclasses.fields(self):
            part = getattr(self, field.name)
            if hasattr(part, "check"):
                part.check()
        for step in self.convert:
            step.check()
        need(
            self.data.batch_size % self.train.accumulation == 0,
            f"train.accumulation is {self.train.accumulation}; it must divide data.batch_size = "
            f"{self.data.batch_size}.",
        )
        micro, shards = self.data.batch_size // self.train.accumulation, self.mesh.data * self.mesh.fsdp
        need(
            micro % shards == 0,
            f"data.batch_size / train.accumulation is {micro}; it must be divisible by mesh.data x mesh.fsdp = "
            f"{shards}.",
        )


def check_rows(rows: tuple[VariantConfig, ...], where: str) -> None:
    """Raises UserError for rows without a name, with one name, or with an illegal model or cache."""
    names = [row.name for row in rows]
    for row in rows:
        need(row.name != "", f"{where} has a row without a name; name it.")
        need(names.count(row.name) == 1, f"{where} has {row.name!r} twice; names must differ.")
        row.cache.check()
        if row.model is not None:
            row.model.check()
