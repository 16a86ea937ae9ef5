"""The study of attention variants: quality, bytes, time."""
