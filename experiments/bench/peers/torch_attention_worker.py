"""torch's candidates of the kernel benchmark, whatever of them is installed; see experiments/bench/kernels.py.

    torch_sdpa           scaled_dot_product_attention, grouped heads by enable_gqa
    torch_sdpa_grouped   the heads of a group as queries of one head: no key is read twice
    torch_flex           flex_attention, compiled
    flashinfer           its paged decode, over pages of 64 where the shape has none; latent: its MLA decode
    flash_mla            latent in pages of 64

Inputs are bf16, drawn here, and every candidate is checked against float32 on them. Calls run in a CUDA graph where
they can be captured and are timed by CUDA events. Nothing here imports jax; torch is imported when first asked.
"""

import importlib.metadata
import importlib.util
import math
import types

from experiments.common import child

PACKAGES = {"torch": "torch", "triton": "triton", "flashinfer": "flashinfer-python", "flash_mla": "flash-mla"}
PAGE = 64  # of a cache that the shape does not page, for candidates that know pages only
GRAPH_CALLS = 16  # calls of one captured graph
DEVICE = "cuda"
HELD = {"turns": {}}


def about():
    """{versions, l2_bytes, missing}; missing["torch"] where nothing can be measured."""
    missing = {name: "not installed" for name in PACKAGES if importlib.util.find_spec(name) is None}
    if "torch" in missing:
        return {"versions": {}, "missing": missing}
    import torch

    versions = {"torch": torch.__version__, "cudnn of torch": str(torch.backends.cudnn.version())}
    for name in ("triton", "flashinfer", "flash_mla"):
        if name not in missing:
            versions[name] = _version(PACKAGES[name])
    if not torch.cuda.is_available():
        return {"versions": versions, "missing": missing | {"torch": "installed, but it sees no GPU"}}
    chip = torch.cuda.get_device_properties(0)
    return {"versions": versions, "missing": missing, "l2_bytes": getattr(chip, "L2_cache_size", 0)}


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # built from source under another name
        return "unknown"


def prepare(shape, calls, wrong):
    """Entry of every candidate: {relative_error, max_error} where it can be timed, else its refusal or error."""
    import torch

    HELD["turns"] = {}
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    s = types.SimpleNamespace(**shape)
    if s.store != "bfloat16":
        return {"torch": {"refused": "its candidates read bf16 K and V"}}
    problem = draw(s)
    want, entries = truth(problem), {}
    for name, make in CANDIDATES.items():
        entries[name], turn = attempt(make, problem, want, calls, wrong)
        if turn:
            HELD["turns"][name] = turn
    return entries


def turn(name):
    """{seconds} of one call, the mean over the calls of one turn."""
    return {"seconds": HELD["turns"][name]()}


def attempt(make, problem, want, calls, wrong):
    """(entry, function that times a turn, or None)."""
    import torch

    try:
        call = make(problem)
        if isinstance(call, str):
            return {"refused": call}, None
        difference = call().float().reshape(want.shape) - want
        entry = {"max_error": difference.abs().max().item(), "relative_error": (difference.norm() / want.norm()).item()}
        if not entry["relative_error"] <= wrong:
            return entry | {"error": f"wrong: |out - float32| / |float32| is {entry['relative_error']:.2g}"}, None
        timer, note = timer_of(call, calls)
        return entry | ({"note": note} if note else {}), timer
    except Exception as error:  # whatever a peer raises is its result
        torch.cuda.synchronize()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}, None


def timer_of(call, calls):
    """(function: seconds of one call, note). The calls are replayed from a graph where they can be captured."""
    import torch

    inside = min(calls, GRAPH_CALLS)
    graph, note = torch.cuda.CUDAGraph(), ""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(inside):
                call()
        run = graph.replay
    except Exception as error:
        torch.cuda.synchronize()
        note = f"launched one by one, not from a graph: {type(error).__name__}"

        def run():
            for _ in range(inside):
                call()

    turns = math.ceil(calls / inside)

    def timer():
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(turns):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / (turns * inside)

    timer()
    return timer, note


# --- inputs -----------------------------------------------------------------------------------------------------


def draw(s):
    """The shape with q[B,N,1,H], K and V ([B,K,S,H], or pages [1+n,K,P,H] with table[B,n] int32) and lengths[B]."""
    import torch

    generator = torch.Generator(DEVICE).manual_seed(0)

    def rand(*lie):
        return torch.randn(lie, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    rows, slots, s.table = s.batch, s.context, None
    if s.page:
        each = -(-s.context // s.page)
        order = 1 + torch.randperm(s.batch * each, generator=generator, device=DEVICE)
        rows, slots, s.table = 1 + s.batch * each, s.page, order.reshape(s.batch, each).to(torch.int32)
    s.q = rand(s.batch, s.heads, 1, s.head_dim)
    s.k = rand(rows, s.k_heads, slots, s.head_dim)
    s.v = s.k[..., : s.v_dim] if s.view else rand(rows, s.k_heads, slots, s.v_dim)
    s.length = torch.tensor(s.lengths, dtype=torch.int32, device=DEVICE)
    s.mask = None
    if s.ragged:
        s.mask = (torch.arange(s.context, device=DEVICE)[None] < s.length[:, None])[:, None, None]
    return s


def truth(s):
    """The float32 result [B,N,V], a row at a time."""
    import torch

    out = []
    for b, length in enumerate(s.lengths):
        k, v = (row_of(s, x, b)[:, :length].float() for x in (s.k, s.v))
        q = s.q[b].float().reshape(s.k_heads, -1, s.head_dim)
        weights = torch.softmax(q @ k.mT * s.scale, -1)
        out.append((weights @ v).reshape(s.heads, s.v_dim))
    return torch.stack(out)


def row_of(s, x, b):
    """[K,S,dim] of one row of the batch."""
    if s.table is None:
        return x[b]
    return x[s.table[b].long()].transpose(0, 1).flatten(1, 2)


def pages_of(s):
    """(K pages [n,K,P,H], V pages or None for latent, pages of each row [B,n] int32, P)."""
    import torch

    if s.page:
        return s.k, None if s.view else s.v, s.table, s.page
    each = s.context // PAGE

    def cut(x):
        x = x.reshape(s.batch, s.k_heads, each, PAGE, x.shape[-1]).transpose(1, 2)
        return x.reshape(s.batch * each, s.k_heads, PAGE, x.shape[-1]).contiguous()

    table = torch.arange(s.batch * each, dtype=torch.int32, device=DEVICE).reshape(s.batch, each)
    return cut(s.k), None if s.view else cut(s.v), table, PAGE


def page_lists(s, table, page):
    """FlashInfer's form of a table: (first page of each row in the list [B+1], pages in use, tokens of the last)."""
    import torch

    used = (s.length + page - 1) // page
    first = torch.zeros(s.batch + 1, dtype=torch.int32, device=DEVICE)
    first[1:] = used.cumsum(0)
    pages = torch.cat([table[b, : int(n)] for b, n in enumerate(used)])
    return first, pages, s.length - (used - 1) * page


# --- candidates: shape with inputs -> function without arguments, or why there is none ---------------------------


def sdpa(s):
    import torch.nn.functional as F

    if s.page:
        return "it has no pages"
    return lambda: F.scaled_dot_product_attention(
        s.q, s.k, s.v, attn_mask=s.mask, scale=s.scale, enable_gqa=s.k_heads < s.heads
    )


def sdpa_grouped(s):
    import torch.nn.functional as F

    if s.page or s.k_heads == s.heads:
        return "it has no pages" if s.page else "the same as torch_sdpa without groups"
    q = s.q.reshape(s.batch, s.k_heads, s.heads // s.k_heads, s.head_dim)
    return lambda: F.scaled_dot_product_attention(q, s.k, s.v, attn_mask=s.mask, scale=s.scale)


def flex(s):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if s.page:
        return "its pages are experimental and are not measured"
    blocks = None
    if s.ragged:
        blocks = create_block_mask(lambda b, h, q, k: k < s.length[b], s.batch, None, 1, s.context, device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(s.q, s.k, s.v, block_mask=blocks, scale=s.scale, enable_gqa=s.k_heads < s.heads)


def flashinfer(s):
    if importlib.util.find_spec("flashinfer") is None:
        return "not installed"
    import flashinfer as lib
    import torch

    k, v, table, page = pages_of(s)
    first, pages, last = page_lists(s, table, page)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE)
    if s.view:
        plan = lib.mla.BatchMLAPagedAttentionWrapper(workspace)
        rows = torch.arange(s.batch + 1, dtype=torch.int32, device=DEVICE)
        plan.plan(
            rows,
            first,
            pages,
            s.length,
            s.heads,
            s.v_dim,
            s.head_dim - s.v_dim,
            page,
            False,
            s.scale,
            torch.bfloat16,
            torch.bfloat16,
        )
        q, held = s.q[:, :, 0], [x.contiguous() for x in (k[:, 0, :, : s.v_dim], k[:, 0, :, s.v_dim :])]
        queries = [x.contiguous() for x in (q[..., : s.v_dim], q[..., s.v_dim :])]
        return lambda: plan.run(*queries, *held, return_lse=False)
    plan = lib.BatchDecodeWithPagedKVCacheWrapper(workspace, kv_layout="HND", use_tensor_cores=s.heads > s.k_heads)
    plan.plan(
        first,
        pages,
        last,
        s.heads,
        s.k_heads,
        s.head_dim,
        page,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
        sm_scale=s.scale,
    )
    q = s.q[:, :, 0].contiguous()
    return lambda: plan.run(q, (k, v))


def flash_mla(s):
    if not s.view:
        return "for latent caches only"
    if importlib.util.find_spec("flash_mla") is None:
        return "not installed"
    import flash_mla as lib

    k, _, table, page = pages_of(s)
    if page != 64:
        return f"reads pages of 64 and these are of {page}"
    q, held = s.q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()  # [B,1,N,576], [n,64,1,576]
    metadata = lib.get_mla_metadata(s.length, s.heads, 1)
    return lambda: lib.flash_mla_with_kvcache(
        q, held, table, s.length, s.v_dim, *metadata[:2], softmax_scale=s.scale, causal=False
    )[0]


CANDIDATES = {
    "torch_sdpa": sdpa,
    "torch_sdpa_grouped": sdpa_grouped,
    "torch_flex": flex,
    "flashinfer": flashinfer,
    "flash_mla": flash_mla,
}

if __name__ == "__main__":
    child.serve({f.__name__: f for f in (about, prepare, turn)})
