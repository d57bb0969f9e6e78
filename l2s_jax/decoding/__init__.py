"""Compiled loops that write responses: greedy, sampled and by beams. They know no family.

Imports models and what it stands on.
"""
