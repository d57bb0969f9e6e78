"""Multi30k, English to French: as configs/multi30k_en_de_smollm2.py, with the French side.

name=multi30k_en_fr_smollm2
python -m l2s_jax.main --config=configs/$name.py --workdir=runs/$name
"""

from ml_collections import ConfigDict

from configs import multi30k_en_de_smollm2


def get_config() -> ConfigDict:
    config = multi30k_en_de_smollm2.get_config()
    config.task.name = "multi30k_en_fr"
    config.task.language = "fr"
    config.task.splits = ConfigDict(
        {
            "train": {"en": "train.en.gz", "fr": "train.fr.gz"},
            "validation": {"en": "val.en.gz", "fr": "val.fr.gz"},
            "test": {"en": "test_2016_flickr.en.gz", "fr": "test_2016_flickr.fr.gz"},
        }
    )
    config.task.response = "fr"
    return config
