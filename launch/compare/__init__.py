"""`python -m moeweave.launch.compare`: training and prefill speed beside transformers' own expert parallelism."""
