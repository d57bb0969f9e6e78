"""The compiled decoding loop. It knows no model, only `step(params, token, cache)`."""
