"""Alpaca instructions: Flan-T5-XL encodes, LaMini-GPT-124M decodes, each with its own tokenizer.

    python -m l2s_jax.main --config=configs/alpaca_lamini.py --workdir=runs/alpaca_lamini

As alpaca_gpt2.py, with checkpoints/lamini-gpt-124m (huggingface.co/MBZUAI/LaMini-GPT-124M), a GPT-2
that was tuned on instructions, as the SLM.
"""

from ml_collections import ConfigDict

from configs import alpaca_gpt2


def get_config() -> ConfigDict:
    config = alpaca_gpt2.get_config()
    config.task.name = "alpaca_lamini"
    config.slm.path = "checkpoints/lamini-gpt-124m"
    return config
