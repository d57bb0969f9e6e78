"""Pure Flax Linen models: T5, the projector, and the LLM-to-SLM hybrid built from them."""
