"""Our systems side by side with other libraries, in one run.

Imports evaluation, and what it stands on.
"""
