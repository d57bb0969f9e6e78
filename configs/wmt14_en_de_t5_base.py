"""WMT14, English to German: T5-Large encodes, T5-base decodes (arXiv 2402.16844, section 4.2).

    name=wmt14_en_de_t5_base
    python -m l2s_jax.main --config=configs/$name.py --workdir=runs/$name

As wmt14_en_de.py, with checkpoints/t5-base (huggingface.co/google-t5/t5-base) as the SLM.
"""

from ml_collections import ConfigDict

from configs import wmt14_en_de


def get_config() -> ConfigDict:
    config = wmt14_en_de.get_config()
    config.slm.path = "checkpoints/t5-base"
    return config
