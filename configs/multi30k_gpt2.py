"""Multi30k, English to German, with a GPT-2-style SLM that has a vocabulary of its own.

    python -m l2s_jax.main --config=configs/multi30k_gpt2.py --workdir=runs/multi30k_gpt2

The LLM and its labels are those of multi30k_en_de.py. Copies of the folders tokenizer, llm and
labels of that run's workdir save making them again.
"""

from ml_collections import ConfigDict

from configs import multi30k_en_de
from l2s_jax.config import model_config


def get_config() -> ConfigDict:
    config = multi30k_en_de.get_config()
    config.slm.tokenizer.update(train_vocab_size=4000, model_type="bpe")
    config.slm.model = model_config("gpt2")
    config.slm.model.update(
        width=112, num_heads=4, feed_forward_width=256, num_layers=3, max_positions=128
    )
    return config
