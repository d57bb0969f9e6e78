"""Pure Flax modules: the families, projector and fusion, and the three systems LLM, SLM and L2S.

Imports cluster and settings.
"""

# Of what the modules compute. It is higher where the same parameters give other results than before
# a change: what was made with an older one is then made anew.
VERSION = 1
