"""Compiles an experiment's programs for a slice that isn't there, and says what fits and what it costs.

Imports experiment, and what it stands on.
"""
