"""Every setting of an experiment: its default, what it may be, and what it means.

On the ground floor: it imports nothing of ours but decoding/search.py, itself a section of
settings, and no JAX.
"""
