"""The partitionings of "Efficiently Scaling Transformer Inference" (Pope et al., arXiv 2211.05102) as rule tables.

A layout says how the matmuls and how K and V are cut over a torus with axes x, y, z (sizes X, Y, Z):

    parse("ws_2d/by_batch:xyz")             2D weight-stationary, cache and attention split by batch
    parse("wg_xyz/by_batch:xyz")            weights gathered over all axes, for prefills of many tokens
    parse("ws_2d/by_head:z+by_batch:yx")    GQA: K/V heads over z, the batch over what is left
    parse("ws_2d/by_seq:xyz")               one long sequence, its context cut over all chips
    parse("ws_2d/replicated")               K and V on every chip: multi-query attention the naive way

`rules(layout, mesh, dims)` is the table. Heads, F and W are split z first, then y, then x; D is split x, z, y and
the batch x, y, z. So every collective of the paper adds or takes away the last axes of a dim, and layouts
that split fewer axes hold whole blocks of layouts that split more. ws_2d and wg_* store weights alike
(E_x F_yz), so that prefill and decode may differ in layout over one copy of the weights; ws_1d stores F_xyz.
"""

import dataclasses
import math
from collections.abc import Mapping

from sharding.layout.rules import Rules, ShardingError

AXES = ("x", "y", "z")
ORDER = ("z", "y", "x")
EMBED_ORDER = ("x", "z", "y")
BATCH_ORDER = ("x", "y", "z")
FFN_LAYOUTS = ("ws_1d", "ws_2d", "wg_x", "wg_xy", "wg_xyz")
KV_PARTS = ("by_head", "by_batch", "by_seq")
# The logical axes that `rules` has rows for: of parameters (C is a latent's rank), and of what a cache holds.
_UNSPLIT = ("layers", "norm", "head_dim", "value_dim", "latent")
PARAMETER_AXES = ("embed", "q_heads", "k_heads", "v_heads", "mlp", "vocab", *_UNSPLIT)
CACHE_AXES = ("cache_heads", "cache_dim")
GATHERED: dict[str, tuple[str, ...]] = {
    "ws_1d": (),
    "ws_2d": (),
    "wg_x": ("x",),
    "wg_xy": ("x", "y"),
    "wg_xyz": ("x", "y", "z"),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """`ffn`: one of FFN_LAYOUTS. The mesh axes K/V heads, the batch and the slots of the cache (and of attention
    over it) are split over; an axis in none of the three holds a replica of K and V.

    Raises ShardingError: an unknown name, an axis used twice.
    """

    ffn: str
    kv_heads: tuple[str, ...] = ()
    kv_batch: tuple[str, ...] = ()
    kv_seq: tuple[str, ...] = ()

    def __post_init__(self):
        if self.ffn not in FFN_LAYOUTS:
            raise ShardingError(f"layout is {self.ffn!r}; choose one of {', '.join(FFN_LAYOUTS)}.")
        used = self.kv_heads + self.kv_batch + self.kv_seq
        for axis in used:
            if axis not in AXES:
                raise ShardingError(f"layout {self.name} names mesh axis {axis!r}; the axes are x, y and z.")
            if used.count(axis) > 1:
                raise ShardingError(f"layout {self.name} splits K and V over {axis!r} twice; name each axis once.")
        for field, order in (("kv_heads", ORDER), ("kv_batch", BATCH_ORDER), ("kv_seq", ORDER)):
            object.__setattr__(self, field, ordered(getattr(self, field), order))

    @property
    def kv(self) -> str:
        """The KV part of the name."""
        axes = zip(KV_PARTS, (self.kv_heads, self.kv_batch, self.kv_seq), strict=True)
        return "+".join(f"{part}:{''.join(sorted(a))}" for part, a in axes if a) or "replicated"

    @property
    def name(self) -> str:
        return f"{self.ffn}/{self.kv}"

    @property
    def gathered(self) -> tuple[str, ...]:
        """The mesh axes that weights are gathered over, and activations split by batch over."""
        return GATHERED[self.ffn]


def parse(text: str) -> Layout:
    """`ffn/kv` -> Layout; a bare by_head, by_batch or by_seq means all three axes. Raises ShardingError."""
    ffn, slash, kv = text.partition("/")
    parts = {"by_head": (), "by_batch": (), "by_seq": ()}
    for item in kv.split("+") if slash and kv != "replicated" else ():
        part, _, axes = item.partition(":")
        if part not in parts or parts[part]:
            raise ShardingError(
                f"layout is {text!r}; write it as ffn/kv, kv being replicated or parts such as "
                "by_head:z, by_batch:xyz, by_seq:x joined by +."
            )
        parts[part] = tuple(axes or "xyz")
    return Layout(ffn, parts["by_head"], parts["by_batch"], parts["by_seq"])


def ordered(axes: tuple[str, ...], order: tuple[str, ...] = ORDER) -> tuple[str, ...]:
    """`axes` in the order in which a dim is split."""
    return tuple(a for a in order if a in axes)


def parts(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    """Into how many pieces `axes` cut a dim."""
    return math.prod(mesh[a] for a in axes)


def rules(layout: Layout, mesh: Mapping[str, int], dims: Mapping[str, int]) -> Rules:
    """The rule table of `layout` on a mesh {x: X, y: Y, z: Z} for a model and pass with sizes `dims`: embed D,
    mlp F, vocab W, q_heads N, k_heads K, v_heads M, batch B, slots S (0 = not asked).

    Raises ShardingError: a dim its axes do not divide, K/V heads not split z first.
    """
    stored = ORDER if layout.ffn == "ws_1d" else ("z", "y")
    embed = () if layout.ffn == "ws_1d" else ("x",)
    gone = layout.gathered
    cols = tuple(a for a in stored if a not in gone)  # of a weight once gathered
    reduced = tuple(a for a in embed if a not in gone)  # what an input projection leaves to sum
    wide = ordered(cols + reduced)  # of its output: the sum is scattered into it
    # Between blocks an activation is split over all chips. Where the batch allows, z splits it and not D: the same
    # bytes on the wire, and D stays in fewer, wider pieces (the published code's [B_z, E_xy], sheet section 10).
    rows = gone or (("z",) if dims["batch"] % mesh["z"] == 0 else ())
    residual = tuple(a for a in EMBED_ORDER if a not in rows)
    _divides(dims["embed"], residual + (embed if gone else ()), mesh, "model.d_model", layout)
    _divides(dims["mlp"], ordered(stored + wide), mesh, "model.d_ff", layout)
    _divides(dims["q_heads"], ordered(stored + wide), mesh, "model.n_heads", layout)
    _divides(dims["vocab"], ordered(stored + embed), mesh, "model.vocab_size", layout)
    _divides(dims["batch"], gone, mesh, "batch", layout)
    held = {one: _prefix(stored, dims[f"{one}_heads"], mesh) for one in ("k", "v")}
    split = tuple(a for a in stored if a in held["k"] + held["v"] and a not in gone)
    # K and V are projected in the rows that the cache keeps, where these continue the rows of the activations.
    batch = ordered(gone + tuple(a for a in layout.kv_batch if a not in split), BATCH_ORDER)
    if gone and layout.kv_batch[: len(batch)] != batch[: len(layout.kv_batch)]:
        batch = gone
    kv = {}
    for one in ("k", "v"):
        own = tuple(a for a in held[one] if a not in gone)
        rest = dims[f"{one}_heads"] // parts(own, mesh)
        spare = tuple(a for a in reduced if a not in batch and rest % mesh[a] == 0)
        kv |= {f"{one}_heads": held[one], f"{one}_batch": batch, f"act_{one}_heads": ordered(own + spare)}
    return {
        **dict.fromkeys(_UNSPLIT, ()),
        "act_length": (),
        "act_head_dim": (),
        "cache_dim": (),
        "embed": embed,
        "mlp": stored,
        "q_heads": stored,
        "vocab": stored,
        **kv,
        "res_batch": rows,
        "res_embed": residual,
        "act_batch": gone,
        "act_embed": reduced,
        "act_mlp": wide,
        "act_q_heads": wide,
        "logit_batch": (),
        "logit_embed": embed,
        "act_vocab": ordered(stored + embed),
        "fresh_batch": gone,
        "fresh_heads": wide,
        "fresh_k_heads": (),
        "fresh_v_heads": (),
        **_attention(layout, mesh, dims, wide),
    }


def _attention(layout: Layout, mesh: Mapping[str, int], dims: Mapping[str, int], wide: tuple[str, ...]) -> dict:
    heads = layout.kv_heads
    if heads != ORDER[: len(heads)]:
        raise ShardingError(
            f"layout {layout.name} splits K/V heads over {'+'.join(heads)}; heads are split over z "
            "first, then y, then x: use by_head:z, by_head:yz or by_head:xyz."
        )
    for name in ("k_heads", "v_heads"):
        _divides(dims[name], heads, mesh, f"model.n_{name}", layout)
    _divides(dims["batch"], layout.kv_batch, mesh, "batch", layout)
    _divides(dims.get("slots", 0), layout.kv_seq, mesh, "the cache's slots", layout)
    # Where a chip holds one K and one V head, its replicas share the query heads; with more, a replica would
    # have to know which of them its query heads read, so replicas do the same work.
    single = max(dims["k_heads"], dims["v_heads"]) == parts(heads, mesh)
    taken = layout.kv_batch + layout.kv_seq
    spare = tuple(a for a in wide if a not in taken + heads) if single else ()
    return {
        "attn_batch": layout.kv_batch,
        "attn_heads": ordered(heads + spare),
        "attn_out_heads": ordered(heads + spare + layout.kv_seq),
        "cache_batch": layout.kv_batch,
        "cache_heads": heads,
        "cache_length": layout.kv_seq,
    }


def _prefix(axes: tuple[str, ...], size: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The longest run of leading axes that divides `size`."""
    count = 0
    while count < len(axes) and size % parts(axes[: count + 1], mesh) == 0:
        count += 1
    return axes[:count]


def _divides(size: int, axes: tuple[str, ...], mesh: Mapping[str, int], what: str, layout: Layout) -> None:
    count = parts(axes, mesh)
    if size % count:
        raise ShardingError(
            f"{what} is {size}, not divisible by the {count} chips of {'+'.join(axes)} that "
            f"{layout.name} splits it over; pad it or take another layout or mesh."
        )
