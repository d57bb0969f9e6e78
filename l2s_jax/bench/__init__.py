"""Our systems side by side with other libraries, in one run.

Imports evaluation and checkpoints, and what they stand on.
"""
