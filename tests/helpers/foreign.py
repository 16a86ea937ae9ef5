"""An attention family that the library has never heard of, written with its public API alone: the acid test.

    zeta    per token, one wide head [latent C | rotated R]: key and, in its first C columns, value
    omega   per sequence, a decayed sum of E numbers of every token, which adds to the output

Queries are narrower (H + R) than what is cached (C + R). Own tokens are attended to in the expanded form, keys and
values of N heads made from the latent; a cache in the absorbed form, the query lifted into the latent and `finish`
taking its result down to V. Parameters have names of their own.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from kvattn.attention import Softmax
from kvattn.attention.operand import Operand, SoftmaxShape
from kvattn.attention.segments import Made, own_heads
from kvattn.cache import LeafSpec
from kvattn.cache.encode import cast, decode
from kvattn.config import Layer, ModelConfig, RopeConfig
from kvattn.config.check import at_least, need
from kvattn.layers import BLOCK, dense, rotate
from kvattn.spec import ParamSpec
from pallas_kernels import Leaf
from sharding import once
from tests.helpers import oracles, tiny

_Q = ("act_batch", "act_length", "act_q_heads", "act_head_dim")
_ONE = ("k_batch", "act_length", "act_head_dim")


@dataclasses.dataclass(frozen=True)
class Foreign(Softmax, tag="test_foreign"):
    """N query heads of width H + R over a latent of C + R numbers a token; values of width V; E decayed sums."""

    n_heads: int = 5
    head_dim: int = 6
    rotary: int = 4
    latent: int = 11
    v_head_dim: int = 7
    memory: int = 3
    decay: float = 0.75

    # --- tables

    def check(self, cfg, layer, where):
        at_least(self, where, n_heads=1, head_dim=1, rotary=2, latent=1, v_head_dim=1, memory=1)
        need(0 < self.decay < 1, f"{where}.decay is {self.decay}; it must lie between 0 and 1.")

    def param_specs(self, cfg, owner):
        d, n, h, r, c, v, e = (
            cfg.d_model,
            self.n_heads,
            self.head_dim,
            self.rotary,
            self.latent,
            self.v_head_dim,
            self.memory,
        )
        specs = {
            "quasar": ParamSpec((d, n, h + r), ("embed", "q_heads", "head_dim"), fan_in=d),
            "lift": ParamSpec((c, n, h), ("head_dim", "q_heads", "head_dim"), fan_in=c),
            "fall": ParamSpec((c, n, v), ("head_dim", "q_heads", "value_dim"), fan_in=c),
            "halo": ParamSpec((n, v, d), ("q_heads", "value_dim", "embed"), fan_in=n * v),
            "echo": ParamSpec((e, d), ("head_dim", "embed"), fan_in=e),
        }
        if owner:
            specs["nebula"] = ParamSpec((d, c + r), ("embed", "head_dim"), fan_in=d)
            specs["drip"] = ParamSpec((d, e), ("embed", "head_dim"), fan_in=d)
        return specs

    def leaves(self, cfg):
        return {
            "zeta": LeafSpec((1, self.latent + self.rotary), role="both"),
            "omega": LeafSpec((self.memory,), per="sequence", axes=(None,), role="state"),
        }

    def rotary_dims(self):
        return (self.rotary,)

    @property
    def scale(self):
        return (self.head_dim + self.rotary) ** -0.5

    def softmax(self, cfg):
        n = self.n_heads
        return SoftmaxShape(n, n, n, self.head_dim + self.rotary, self.v_head_dim, self.scale)

    # --- a pass

    def entries(self, params, cfg, layer, x, where, state):
        made = dense(x, params["nebula"], None, ("embed", "head_dim"), BLOCK, _ONE)
        table = where.k_tables[cfg.rope(layer), self.rotary]
        turned = rotate(made[:, :, None, self.latent :], table)[:, :, 0]
        zeta = jnp.concatenate([made[:, :, : self.latent], turned], -1)[:, None]
        drops = dense(x, params["drip"], None, ("embed", "head_dim"), BLOCK, _ONE).astype(jnp.float32)
        here = where.made.positions >= 0

        def step(omega, token):
            drop, real = token
            omega = jnp.where(real[:, None], self.decay * omega + drop, omega)
            return omega, omega

        last, every = jax.lax.scan(step, state["omega"], (drops.swapaxes(0, 1), here.swapaxes(0, 1)))
        return Made({"zeta": zeta}, {"omega": last}, every.swapaxes(0, 1))

    def queries(self, params, cfg, layer, x, where):
        q = dense(x, params["quasar"], None, ("embed", "q_heads", "head_dim"), BLOCK, _Q)
        table = where.q_tables[cfg.rope(layer), self.rotary]
        return {"still": q[..., : self.head_dim], "turned": rotate(q[..., self.head_dim :], table)}

    def operand(self, params, cfg, layer, q, segment):
        zeta, c = segment.leaves["zeta"], self.latent
        dtype = q["still"].dtype
        if segment.own:  # expanded
            held = decode(zeta, dtype)[:, 0]
            n = q["still"].shape[2]
            k = jnp.einsum("bsc,cnh->bnsh", held[..., :c], params["lift"])
            shared = jnp.broadcast_to(held[:, None, :, c:], (*k.shape[:3], self.rotary))
            k = jnp.concatenate([k, shared], -1)
            v = jnp.einsum("bsc,cnv->bnsv", held[..., :c], params["fall"])
            k, v = (own_heads(Leaf(a), n, True) for a in (k, v))
            return Operand(jnp.concatenate([q["still"], q["turned"]], -1), k, v, self.scale)
        lifted = jnp.einsum("btnh,cnh->btnc", q["still"], params["lift"])
        k = cast(zeta, dtype)
        values = k.values[:, :, :c] if k.lanes else k.values[..., :c]
        return Operand(
            jnp.concatenate([lifted, q["turned"]], -1),
            k,
            Leaf(values, k.scale, k.lanes),
            self.scale,
            finish=lambda out: jnp.einsum("btnc,cnv->btnv", out, params["fall"].astype(out.dtype)),
            kv=self.kernel_kv(cfg, segment.cache),
            address=segment.cache.address,
        )

    def kernel_kv(self, cfg, cache):
        return cache.address.kv(cache.leaves["zeta"], None, self.latent)

    def output(self, params, cfg, layer, context, view):
        out = dense(context, params["halo"], None, ("q_heads", "value_dim", "embed"), _Q, None)
        omega = view.pass_only.astype(out.dtype)
        return out + once(jnp.einsum("bte,ed->btd", omega, params["echo"]), "q_heads")


def oracle(p, cfg, layer, h, h_kv, shared, positions):
    """float64: (attention output [T,D], what the owner left), one score at a time."""
    f, rope, length = cfg.attention(layer), cfg.rope(layer), len(h)
    if "nebula" in p:
        made, latent, keys, omega, sums = h_kv @ p["nebula"], [], [], np.zeros(f.memory), []
        for t in range(length):
            latent.append(made[t, : f.latent])
            keys.append(oracles.rotate(made[t, f.latent :], rope, positions[t]))
            omega = f.decay * omega + h_kv[t] @ p["drip"]
            sums.append(omega)
        shared = latent, keys, sums
    latent, keys, sums = shared
    out = np.zeros((length, h.shape[1]))
    for t in range(length):
        out[t] = sums[t] @ p["echo"]
        for n in range(f.n_heads):
            q = h[t] @ p["quasar"][:, n]
            still, turned = q[: f.head_dim], oracles.rotate(q[f.head_dim :], rope, positions[t])
            seen = [s for s in range(length) if oracles.visible(cfg.mask(layer), t, s)]
            scores = [(still @ (latent[s] @ p["lift"][:, n]) + turned @ keys[s]) * f.scale for s in seen]
            weights = [math.exp(s - max(scores)) for s in scores]
            for s, w in zip(seen, weights, strict=True):
                out[t] += w / sum(weights) * (latent[s] @ p["fall"][:, n]) @ p["halo"][n]
    return out, shared


def model_of(*attentions, masks=(), **changes) -> ModelConfig:
    """A tiny decoder whose layers have these families in turn."""
    rope, masks = RopeConfig(theta=100.0), masks or (tiny.BASE.mask(0),)
    layers = tuple(Layer(a, masks[i % len(masks)], rope) for i, a in enumerate(attentions))
    return dataclasses.replace(tiny.BASE, layers=layers, **changes)
