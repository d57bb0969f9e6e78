"""State, step and loop; optimizers, losses, Orbax checkpoints, the clock and the progress of a run.

Imports decoding, data, checkpoints, and what they stand on.
"""

# JAX's name of what masks of dropout are drawn by. Its numbers do not depend on how devices split
# an array, so that each makes its own part.
PRNG = "threefry2x32"
