"""State, step and loop; optimizers, losses, Orbax checkpoints, the clock and the progress of a run.

Imports models and cluster.
"""
