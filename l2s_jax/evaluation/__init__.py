"""Quality, latency, the report, its plots, the model card.

Imports experiment, and what it stands on.
"""
