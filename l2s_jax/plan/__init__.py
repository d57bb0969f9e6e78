"""Compiles an experiment for a slice that isn't there, and says what fits and what it costs.

Imports experiment, and what it stands on.
"""
