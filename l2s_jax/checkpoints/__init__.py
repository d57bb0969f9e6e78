"""Models in folders: Hugging Face's formats and ours, read into shardings and written.

Imports models and what it stands on.
"""
