"""Speed of L2S, its LLM and its SLM beside what people use today: `python -m l2s_jax.bench`."""
