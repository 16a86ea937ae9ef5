"""Decode layouts: names, every mistake, the whole rule tables as text, and which layouts are legal."""

import itertools

import pytest

from sharding import ShardingError
from sharding.layout import torus_layouts
from sharding.layout.torus_layouts import AXES, FFN_LAYOUTS, Layout

MESH = {"x": 2, "y": 2, "z": 2}
GQA = {"embed": 48, "mlp": 40, "vocab": 64, "q_heads": 8, "k_heads": 4, "v_heads": 4, "batch": 8, "slots": 16}
MQA = GQA | {"k_heads": 1, "v_heads": 1}
MHA = GQA | {"k_heads": 8, "v_heads": 8}


def every_layout():
    """All ways of giving each mesh axis to K/V heads, the batch, the slots or nothing, for every FFN layout."""
    for ffn, use in itertools.product(FFN_LAYOUTS, itertools.product(("heads", "batch", "seq", ""), repeat=3)):
        yield Layout(
            ffn, *(tuple(a for a, u in zip(AXES, use, strict=True) if u == part) for part in ("heads", "batch", "seq"))
        )


ALL = tuple(every_layout())


def table(text, dims=GQA, mesh=MESH):
    return torus_layouts.rules(torus_layouts.parse(text), mesh, dims)


# --- names -------------------------------------------------------------------------------------------------


def test_parse_is_the_inverse_of_name():
    assert len(ALL) == len({one.name for one in ALL}) == 5 * 4**3
    for one in ALL:
        assert torus_layouts.parse(one.name) == one


def test_parse_reads_axes_in_any_order_and_none_as_all():
    assert torus_layouts.parse("ws_2d") == torus_layouts.parse("ws_2d/replicated") == Layout("ws_2d")
    assert torus_layouts.parse("wg_x/by_seq") == Layout("wg_x", kv_seq=("z", "y", "x"))
    assert torus_layouts.parse("wg_x/by_batch:zx").kv_batch == ("x", "z")
    got = torus_layouts.parse("ws_1d/by_batch:yx+by_head:z")
    assert got == Layout("ws_1d", ("z",), ("x", "y")) and got.name == "ws_1d/by_head:z+by_batch:xy"


@pytest.mark.parametrize(
    "text, message",
    [
        ("ws_3d/replicated", "layout is 'ws_3d'; choose one of ws_1d, ws_2d, wg_x, wg_xy, wg_xyz"),
        ("", "layout is ''; choose one of"),
        ("ws_2d/by_row:x", "layout is 'ws_2d/by_row:x'; write it as ffn/kv"),
        ("ws_2d/", "layout is 'ws_2d/'; write it as ffn/kv"),
        ("ws_2d/by_seq:x+by_seq:y", "layout is 'ws_2d/by_seq:x.by_seq:y'; write it as ffn/kv"),
        ("ws_2d/by_batch:xw", "names mesh axis 'w'; the axes are x, y and z"),
        ("ws_2d/by_batch:xyx", "splits K and V over 'x' twice; name each axis once"),
        ("ws_2d/by_batch:yz+by_seq:z", "splits K and V over 'z' twice; name each axis once"),
    ],
)
def test_a_name_that_is_none_is_one_sentence(text, message):
    with pytest.raises(ShardingError, match=message) as caught:
        torus_layouts.parse(text)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


# --- illegal combinations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, changes, message",
    [
        ("ws_2d/by_head:y", {}, "by_head:y splits K/V heads over y; heads are split over z first"),
        ("ws_2d/by_head:xz", {}, "heads over z.x; heads are split over z first, then y, then x: use by_head:z"),
        ("ws_2d/by_head:xyz", {}, "model.n_k_heads is 4, not divisible by the 8 chips of z.y.x"),
        ("ws_2d/by_head:yz", {"v_heads": 2}, "model.n_v_heads is 2, not divisible by the 4 chips of z.y"),
        ("wg_x/by_batch:xyz", {"batch": 6}, "batch is 6, not divisible by the 8 chips of x.y.z that wg_x/by_batch:xyz"),
        ("wg_xyz/replicated", {"batch": 4}, "batch is 4, not divisible by the 8 chips of x.y.z that wg_xyz/replicated"),
        ("wg_xy/replicated", {"batch": 6}, "batch is 6, not divisible by the 4 chips of x.y that wg_xy"),
        ("ws_2d/by_seq:yz", {"slots": 18}, "the cache's slots is 18, not divisible by the 4 chips of z.y"),
        ("ws_2d/replicated", {"q_heads": 12}, "model.n_heads is 12, not divisible by the 8 chips"),
        ("wg_xyz/by_batch:xyz", {"q_heads": 6}, "model.n_heads is 6, not divisible by the 4 chips of z.y"),
        ("ws_2d/replicated", {"embed": 46}, "model.d_model is 46, not divisible by the 4 chips of x.y"),
        ("ws_2d/replicated", {"embed": 44, "batch": 1}, "model.d_model is 44, not divisible by the 8 chips of x.z.y"),
        ("wg_xyz/replicated", {"embed": 47}, "model.d_model is 47, not divisible by the 2 chips of x that"),
        ("ws_1d/replicated", {"mlp": 36}, "model.d_ff is 36, not divisible by the 8 chips"),
        ("wg_x/replicated", {"vocab": 61}, "model.vocab_size is 61, not divisible by the 8 chips"),
    ],
)
def test_an_illegal_combination_names_the_field_its_value_and_the_axes(text, changes, message):
    if changes:
        table(text)  # legal but for them
    with pytest.raises(ShardingError, match=message) as caught:
        table(text, GQA | changes)
    assert str(caught.value).count(". ") == 0 and str(caught.value).endswith(".")


def test_each_axis_counts_with_its_own_size():
    """On 1x2x4 the same names cut into other numbers of pieces."""
    mesh = {"x": 1, "y": 2, "z": 4}
    assert table("ws_2d/by_head:z+by_batch:xy", mesh=mesh)["cache_heads"] == ("z",)
    with pytest.raises(ShardingError, match="model.n_k_heads is 4, not divisible by the 8 chips of z.y"):
        table("ws_2d/by_head:yz", mesh=mesh)
    with pytest.raises(ShardingError, match="batch is 6, not divisible by the 4 chips of z"):
        table("ws_2d/by_batch:z", GQA | {"batch": 6}, mesh)
    table("ws_2d/by_batch:y", GQA | {"batch": 6}, mesh)


@pytest.mark.parametrize("dims, heads, count", [(MQA, 0, 27), (GQA, 2, 39), (MHA, 3, 40)], ids=("mqa", "gqa4", "mha8"))
def test_legal_and_illegal_layouts_are_all_layouts(dims, heads, count):
    """On 2x2x2 with a batch of 8 only K/V heads can rule a layout out: at most `heads` axes, z first. The other axes
    go to the batch, the slots or nothing: 27 + 9 + 3 + 1 ways."""
    legal, illegal = set(), set()
    for one in ALL:
        try:
            torus_layouts.rules(one, MESH, dims)
            legal.add(one)
        except ShardingError as error:
            assert "heads" in str(error)
            illegal.add(one)
    assert len(legal) == count * len(FFN_LAYOUTS) and len(legal) + len(illegal) == len(ALL)
    runs = ((), ("z",), ("z", "y"), ("z", "y", "x"))[: heads + 1]
    assert legal == {one for one in ALL if one.kv_heads in runs}


# --- the tables ----------------------------------------------------------------------------------------------

NEVER = "layers norm head_dim value_dim latent act_length act_head_dim cache_dim".split()

# Of each layout, the rows that split something. Weights: E_x F_yz in 2D and weight-gathered, E F_xyz in 1D; the
# batch of activations follows the gathered axes; D between blocks keeps z for the batch where that divides.
GOLDEN = {
    ("ws_2d/by_batch:xyz", "mqa"): """\
act_embed x
act_mlp z+y+x
act_q_heads z+y+x
act_vocab z+y+x
attn_batch x+y+z
cache_batch x+y+z
embed x
k_batch x+y+z
logit_embed x
mlp z+y
own_heads z+y+x
q_heads z+y
res_batch z
res_embed x+y
v_batch x+y+z
vocab z+y""",
    ("ws_1d/by_head:z", "gqa"): """\
act_k_heads z+y
act_mlp z+y+x
act_q_heads z+y+x
act_v_heads z+y
act_vocab z+y+x
attn_heads z
attn_out_heads z
cache_heads z
k_heads z+y
mlp z+y+x
own_heads z+y+x
q_heads z+y+x
res_batch z
res_embed x+y
v_heads z+y
vocab z+y+x""",
    ("wg_xyz/by_batch:xyz", "mqa"): """\
act_batch x+y+z
act_vocab z+y+x
attn_batch x+y+z
cache_batch x+y+z
embed x
k_batch x+y+z
logit_embed x
mlp z+y
own_batch x+y+z
q_heads z+y
res_batch x+y+z
v_batch x+y+z
vocab z+y""",
    ("ws_2d/by_head:z+by_batch:xy", "gqa"): """\
act_embed x
act_k_heads z+y
act_mlp z+y+x
act_q_heads z+y+x
act_v_heads z+y
act_vocab z+y+x
attn_batch x+y
attn_heads z
attn_out_heads z
cache_batch x+y
cache_heads z
embed x
k_batch x
k_heads z+y
logit_embed x
mlp z+y
own_heads z+y+x
q_heads z+y
res_batch z
res_embed x+y
v_batch x
v_heads z+y
vocab z+y""",
}


@pytest.mark.parametrize("text, kind", GOLDEN)
def test_golden_table(text, kind):
    """The whole table as text: a changed rule shows up as a changed line."""
    got = table(text, MQA if kind == "mqa" else GQA)
    assert "\n".join(f"{name} {'+'.join(axes)}" for name, axes in sorted(got.items()) if axes) == GOLDEN[text, kind]
    assert not any(got[name] for name in NEVER)


def test_a_batch_of_one_splits_the_stream_by_embedding_alone():
    got = table("ws_2d/by_seq:xyz", MQA | {"batch": 1})
    assert got["res_batch"] == () and got["res_embed"] == ("x", "z", "y")
    assert got["cache_length"] == ("z", "y", "x") and got["attn_heads"] == () and got["attn_batch"] == ()
    assert got["attn_out_heads"] == ("z", "y", "x")  # the merged softmax is scattered into heads


@pytest.mark.parametrize("dims", [MQA, GQA, MHA], ids=("mqa", "gqa4", "mha8"))
def test_2d_and_weight_gathered_layouts_store_weights_alike(dims):
    """Prefill and decode may then differ in layout over one copy of the weights. ws_1d stores D whole."""
    rows = ("embed", "mlp", "q_heads", "k_heads", "v_heads", "vocab")
    stored = [{row: table(f"{ffn}/by_batch:xyz", dims)[row] for row in rows} for ffn in FFN_LAYOUTS]
    assert stored[1:] == [stored[1]] * 4
    assert stored[0]["embed"] == () and stored[0] != stored[1]


def test_no_table_puts_two_dims_of_an_array_on_one_axis():
    """Of weights, caches, the residual stream, projections and attention, in every legal layout and model."""
    arrays = [
        ("embed", "mlp"),
        ("q_heads", "embed"),
        ("vocab", "embed"),
        ("k_heads", "embed"),
        ("v_heads", "embed"),
        ("cache_batch", "cache_heads", "cache_length"),
        ("res_batch", "res_embed"),
        ("act_batch", "act_embed"),
        ("act_batch", "act_mlp"),
        ("act_batch", "act_q_heads"),
        ("k_batch", "act_k_heads"),
        ("v_batch", "act_v_heads"),
        ("attn_batch", "attn_heads"),
        ("attn_batch", "attn_out_heads"),
        ("own_batch", "own_heads"),
        ("logit_batch", "act_vocab"),
    ]
    for one, dims in itertools.product(ALL, (MQA, GQA, MHA)):
        try:
            got = torus_layouts.rules(one, MESH, dims)
        except ShardingError:
            continue
        for names in arrays:
            axes = [a for name in names for a in got[name]]
            assert len(axes) == len(set(axes)), f"{one.name}: {names} over {axes}"
