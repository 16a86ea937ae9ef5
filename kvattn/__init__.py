"""kvattn: which attention gives a model the best quality for its KV-cache bytes."""
