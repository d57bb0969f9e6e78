"""WMT16, English to Romanian, T5-Large -> T5-small (configs/wmt14_en_de.py says how to get them).

tfds build wmt16_translate/ro-en --file_format=array_record
python -m l2s_jax.main --config=configs/wmt16_en_ro.py --workdir=runs/wmt16_en_ro
"""

from ml_collections import ConfigDict

from configs import wmt14_en_de


def get_config() -> ConfigDict:
    config = wmt14_en_de.get_config()
    config.task.name = "wmt16_en_ro"
    config.task.tfds_name = "wmt16_translate/ro-en"
    config.task.splits.train = "train"
    config.task.prompt = "translate English to Romanian: {en}"
    config.task.response = "ro"
    return config
