"""LLM-to-SLM in JAX/Flax: encode once with a large model, decode with a small one."""

__version__ = "0.1.0"
