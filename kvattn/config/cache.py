"""Axis D as a value: how K and V are addressed, encoded and kept."""

import dataclasses

from kvattn.config.check import CODES, choice, need
from kvattn.config.tagged import Tagged

KINDS = ("full", "ring", "by_mask", "paged", "kept")


class Keep(Tagged, root="name"):
    """Root of every keep-policy's config; kvattn.cache.keep.base.Policy says what a policy must provide."""


class Encoding(Tagged, root="name"):
    """Root of encodings that are no dtype of CacheConfig; kvattn.cache.encode says what an encoding must provide."""


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Axis D. `kinds` is a pattern over layers (the owner's entry counts): full | ring | by_mask | paged | kept.

    `ring` holds the widest reader's window plus its sinks and needs every reader of the owner to be windowed;
    `by_mask` is ring where that holds and full elsewhere; `paged` holds pages of `page_size` tokens, given out by a
    table, from a pool of `pages` per owner layer (0 = enough for every sequence at capacity); `kept` has a position a
    slot and head, for tokens that a policy chose, and pages per (row, head) with `kept_pages`.

    int8, int4 and float8_e4m3fn are codes with float32 scales: one a token and head, or with key_scale "channel" one a
    key channel, fixed by a sequence's first tokens (kvattn/cache/encode.py); `encoding`: another way, of that file's
    registry. `layout` "lanes" holds K and V as [dim, S], "v_lanes" V only. Slots of full and ring stores are rounded
    up to a multiple of `multiple`. `keep`: what is dropped after a prefill (None = nothing).
    """

    kinds: tuple[str, ...] = ("full",)
    dtype: str = "float32"  # float32 | bfloat16 | int8 | int4 | float8_e4m3fn
    capacity: int = 0  # tokens per sequence; 0 = what the command needs (prompt + new tokens)
    key_scale: str = "token"  # token | channel (codes only)
    layout: str = "rows"  # rows | lanes | v_lanes
    multiple: int = 1
    page_size: int = 64  # P: 16, 32, 64, 128 or 256
    pages: int = 0
    kept_pages: bool = False
    memory: int = 0  # slots of the stores that an encoder's output is written to, once
    keep: Keep | None = None
    encoding: Encoding | None = None

    def check(self) -> None:
        """Raises UserError for the first illegal field; what a model needs of a store: kvattn.cache.check_store."""
        need(len(self.kinds) > 0, "cache.kinds is (); it needs at least one entry.")
        for kind in self.kinds:
            choice(kind, KINDS, "cache.kinds")
        choice(self.dtype, ("float32", "bfloat16", *CODES), "cache.dtype")
        choice(self.key_scale, ("token", "channel"), "cache.key_scale")
        choice(self.layout, ("rows", "lanes", "v_lanes"), "cache.layout")
        need(
            self.capacity >= 0,
            f"cache.capacity is {self.capacity}; use 0 for what the command needs or a positive size.",
        )
        need(self.multiple >= 1, f"cache.multiple is {self.multiple}; slots are rounded up to it, give at least 1.")
        need(
            self.page_size in (16, 32, 64, 128, 256),
            f"cache.page_size is {self.page_size}; choose one of 16, 32, 64, 128, 256.",
        )
        need(
            self.pages >= 0, f"cache.pages is {self.pages}; use 0 for as many as the batch needs or a positive number."
        )
        need(
            self.pages == 0 or "paged" in self.kinds,
            f"cache.pages is {self.pages} but cache.kinds has no paged; set it to 0.",
        )
        need(
            not self.kept_pages or "kept" in self.kinds,
            "cache.kept_pages is True but cache.kinds has no kept; set it to False.",
        )
        if self.key_scale == "channel":
            need(
                self.dtype in CODES,
                f"cache.key_scale is 'channel' with cache.dtype {self.dtype!r}, without scales; use "
                f"{', '.join(CODES)}.",
            )
            need(
                not {"paged", "kept"} & set(self.kinds),
                "cache.key_scale is 'channel' with paged or kept in cache.kinds; a channel scale belongs to the tokens "
                "of one sequence, use token.",
            )
        if self.encoding is not None:
            need(
                self.dtype in ("float32", "bfloat16"),
                f"cache.encoding is {self.encoding.tag!r} with cache.dtype {self.dtype!r}; leave the dtype at "
                "float32 or "
                "bfloat16, the encoding says what is held.",
            )
        if self.keep is not None:
            self.keep.check()
