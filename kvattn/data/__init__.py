"""Text and tokens: corpora, tokenizers, packing, resumable batches."""
