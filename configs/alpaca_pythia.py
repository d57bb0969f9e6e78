"""Alpaca instructions: Flan-T5-XL encodes, Pythia-160M decodes, each with its own tokenizer.

    python -m l2s_jax.main --config=configs/alpaca_pythia.py --workdir=runs/alpaca_pythia

As alpaca_gpt2.py, with checkpoints/pythia-160m (huggingface.co/EleutherAI/pythia-160m) as the SLM.
"""

from ml_collections import ConfigDict

from configs import alpaca_gpt2


def get_config() -> ConfigDict:
    config = alpaca_gpt2.get_config()
    config.task.name = "alpaca_pythia"
    config.slm.path = "checkpoints/pythia-160m"
    return config
