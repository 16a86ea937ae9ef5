"""Study rows: a name, the conversions that make it from a checkpoint, and the cache it decodes with.

Adding a variant to the study is adding a row here. The conversions and their order are explained in
kvattn/convert/; the papers are GQA 2305.13245, CLA 2405.12981, MLKV 2406.09297, StreamingLLM 2309.17453.
"""

from kvattn.config import CacheConfig, Conversion, VariantConfig
from kvattn.errors import UserError

_MQA = Conversion.of("gqa", k_heads=1)
_CLA2 = Conversion.of("cla", factor=2)
_CLA3 = Conversion.of("cla", factor=3)
_HALF = Conversion.of("first_half")
# Two layers of three see 128 tokens and 4 sinks, every third sees everything.
_WINDOW = Conversion.of("window", window=128, sinks=4, keep_every=3)

_BY_MASK = CacheConfig(kinds=("by_mask",))
_BF16 = CacheConfig(dtype="bfloat16")

ROWS: dict[str, VariantConfig] = {
    row.name: row
    for row in (
        VariantConfig("base"),
        VariantConfig("base_bf16", cache=_BF16),
        VariantConfig("base_int8", cache=CacheConfig(dtype="int8")),
        VariantConfig("base_fp8", cache=CacheConfig(dtype="float8_e4m3fn")),
        VariantConfig("base_int4", cache=CacheConfig(dtype="int4")),
        VariantConfig("base_int4_channel", cache=CacheConfig(dtype="int4", key_scale="channel")),
        VariantConfig("base_paged", cache=CacheConfig(kinds=("paged",))),
        VariantConfig("mqa", (_MQA,)),
        VariantConfig("mqa_first", (Conversion.of("gqa", k_heads=1, method="first"),)),
        VariantConfig("mqa_random", (Conversion.of("gqa", k_heads=1, method="random"),)),
        VariantConfig("v1", (Conversion.of("gqa", k_heads=3, v_heads=1),)),
        VariantConfig("k1", (Conversion.of("gqa", k_heads=1, v_heads=3),)),
        VariantConfig("cla2", (_CLA2,)),
        VariantConfig("cla3", (_CLA3,)),
        VariantConfig("first_half", (_HALF,)),
        VariantConfig("mlkv", (Conversion.of("mlkv", owners=10, k_heads=1, method="running"),)),
        VariantConfig("mqa_cla2", (_MQA, _CLA2)),
        VariantConfig("mqa_cla3", (_MQA, _CLA3)),
        VariantConfig("window_sinks", (_WINDOW,), _BY_MASK),
        VariantConfig("mqa_window_sinks", (_MQA, _WINDOW), _BY_MASK),
    )
}


def rows(*names: str) -> tuple[VariantConfig, ...]:
    """Rows by name, in the order asked. Raises UserError for an unknown name."""
    for name in names:
        if name not in ROWS:
            raise UserError(f"variant is {name!r}; choose one of {', '.join(ROWS)}.")
    return tuple(ROWS[name] for name in names)
