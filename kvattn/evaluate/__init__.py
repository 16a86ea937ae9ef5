"""Evaluation through the real cache: perplexity, needle, recall, and the scoring engine under them."""
