"""Compiles an experiment's programs for a slice that isn't there, and says what fits.

Imports training, serving, and what they stand on.
"""
