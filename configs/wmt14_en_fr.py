"""WMT14, English to French, T5-Large -> T5-small (configs/wmt14_en_de.py says how to get them).

tfds build wmt14_translate/fr-en --file_format=array_record
python -m l2s_jax.main --config=configs/wmt14_en_fr.py --workdir=runs/wmt14_en_fr
"""

from ml_collections import ConfigDict

from configs import wmt14_en_de


def get_config() -> ConfigDict:
    config = wmt14_en_de.get_config()
    config.task.name = "wmt14_en_fr"
    config.task.tfds_name = "wmt14_translate/fr-en"
    config.task.prompt = "translate English to French: {en}"
    config.task.response = "fr"
    return config
