"""Workers of the benchmarks against peers, each a process of its own: experiments/bench/comparison.py asks them."""
