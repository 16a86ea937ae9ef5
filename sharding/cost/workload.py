"""What a model asks of a machine, as numbers: the input of the cost model, free of arrays and configs.

A `Workload` is built from a kvattn config by `kvattn.plan.workload`, or by hand. Letters as in the design: D model
width, N query heads, F MLP width, W vocabulary; a cache is a table of named leaves (heads, dim), so that plain heads
{k: (K, H), v: (M, V)} and latent caches {latent: (1, C), k_rope: (1, R)} are the same thing.
"""

import dataclasses

RESIDUALS = ("serial", "parallel", "ladder")
# Bits per element, and bytes of the scale that each token and head of a leaf carries.
KV_TYPES = {"float32": (32, 0), "bfloat16": (16, 0), "fp8": (8, 2), "int8": (8, 2), "int4": (4, 2)}
WEIGHT_BYTES = {"bfloat16": 2, "int8": 1}  # int8: one scale per output channel, under 0.1 % of the bytes


@dataclasses.dataclass(frozen=True)
class Layer:
    """`count` layers that are alike. Elements of the weights q, k, v, o, of all mlp-in matrices together (one or two)
    and of mlp-out; k and v are 0 in a layer that reads another's cache. `extra` elements (norms, biases) are held by
    every chip; `norms`: norms over D; `kv_norm`: one of them is in front of k and v alone.

    leaves   (name, heads, dim) of the cache the layer reads, its own or its owner's
    visible  keys that a query sees, window and sinks together; 0 = all
    slots    tokens the owner's cache holds at most, a ring's; 0 = all
    """

    count: int
    owner: bool
    q: int
    k: int
    v: int
    o: int
    mlp_in: int
    mlp_out: int
    leaves: tuple[tuple[str, int, int], ...]
    visible: int = 0
    slots: int = 0
    extra: int = 0
    norms: int = 2
    kv_norm: bool = False

    @property
    def elements(self) -> int:
        """Scalar parameters of one such layer."""
        return self.q + self.k + self.v + self.o + self.mlp_in + self.mlp_out + self.extra

    def held(self, context: int) -> int:
        """Slots of the owner's cache at `context` tokens."""
        return min(self.slots or context, context)

    def seen(self, context: int) -> int:
        """Keys that one query is charged for."""
        return min(self.visible or context, context)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model. `q_dim`, `o_dim`: width of a query head as projected and of its output; `score_dim`, `value_dim`: the
    widths that attention multiplies per key, C + R and C for an absorbed latent (0 = q_dim, o_dim). `gates`: mlp-in
    matrices, 2 when gated. `residual`: serial, parallel (attention and MLP read one input and add into one sum) or
    ladder (a module's reduction is awaited only after the next module). `counted_params`: N of the 2N FLOPs per
    token in MFU, without padded heads (0 = all parameters). `norm_means`: means over D in a norm, 1 (RMS) or 2."""

    d_model: int
    d_ff: int
    n_heads: int
    q_dim: int
    o_dim: int
    vocab: int
    layers: tuple[Layer, ...]
    tied: bool = True
    gates: int = 2
    residual: str = "serial"
    score_dim: int = 0
    value_dim: int = 0
    extra: int = 0
    weight_bytes: float = 2
    act_bytes: float = 2
    kv_bits: int = 16
    kv_scale_bytes: int = 0
    counted_params: int = 0
    norm_means: int = 1

    @property
    def n_params(self) -> int:
        """Scalar parameters."""
        tables = self.vocab * self.d_model * (1 if self.tied else 2)
        return tables + self.extra + sum(layer.count * layer.elements for layer in self.layers)

    @property
    def k_heads(self) -> int:
        """Heads of the first leaf."""
        return self.layers[0].leaves[0][1]

    @property
    def v_heads(self) -> int:
        """Heads of the last leaf."""
        return self.layers[0].leaves[-1][1]

    def leaf_bytes(self, heads: int, dim: int) -> float:
        """Bytes that one token leaves in a leaf."""
        return heads * (dim * self.kv_bits / 8 + self.kv_scale_bytes)

    def token_bytes(self, layer: Layer) -> float:
        """Bytes that one token has in the cache that `layer` reads, all its heads."""
        return sum(self.leaf_bytes(heads, dim) for _, heads, dim in layer.leaves)
