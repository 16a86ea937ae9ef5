"""Logical axes of q and of the attention result [B,T,N,H]: as projected, over own tokens, over a cache."""

MADE = ("act_batch", "act_length", "act_q_heads", "act_head_dim")
OWN = ("own_batch", "act_length", "own_heads", "act_head_dim")
CACHED = ("attn_batch", "act_length", "attn_heads", "act_head_dim")
CACHED_OUT = ("attn_batch", "act_length", "attn_out_heads", "act_head_dim")

# Of per-token entries [B,heads,T,dim]: beside own tokens, by role, and as a cache holds them.
OWN_KEYS = ("own_batch", "own_k_heads", "act_length", "cache_dim")
OWN_VALUES = ("own_batch", "own_v_heads", "act_length", "cache_dim")
HELD = ("cache_batch", "cache_heads", "act_length", "cache_dim")
