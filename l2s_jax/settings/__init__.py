"""Every setting of an experiment: its default, what it may be, and what it means.

Imports no other room, and no JAX.
"""
