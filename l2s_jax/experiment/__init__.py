"""The stages of an experiment and its workdir: tokenizers, LLM, labels, features, SLM, L2S.

Imports training and serving, and what they stand on.
"""
