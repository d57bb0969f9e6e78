"""The HTTP server: OpenAI's protocol in front of lanes of requests. All of `async` is in this room.

`python -m l2s_jax.serve --model=DIR`. Imports serving, and what it stands on.
"""
