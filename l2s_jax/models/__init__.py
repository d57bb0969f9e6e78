"""Pure Flax modules: the families, projector and fusion, and the three systems LLM, SLM and L2S.

Imports cluster.
"""
