"""Multi30k, English to German, with a pretrained LLM: SmolLM2-135M-Instruct.

    name=multi30k_en_de_smollm2
    python -m l2s_jax.convert --input="$(launch/smollm2.sh)" --output=checkpoints/smollm2 --to=hf
    python -m l2s_jax.main --config=configs/$name.py --workdir=runs/$name

The data are those of configs/multi30k_en_de.py.
"""

from ml_collections import ConfigDict

from l2s_jax.config import default


def get_config() -> ConfigDict:
    config = default()
    config.task.name = "multi30k_en_de"
    config.task.source = "text"
    config.task.language = "de"
    config.task.data_dir = "data/multi30k"
    config.task.splits = ConfigDict(
        {
            "train": {"en": "train.en.gz", "de": "train.de.gz"},
            "validation": {"en": "val.en.gz", "de": "val.de.gz"},
            "test": {"en": "test_2016_flickr.en.gz", "de": "test_2016_flickr.de.gz"},
        }
    )
    # A line break is enough to tell the trained LLM that the sentence ends.
    config.task.prompt = "{en}\n"
    config.task.response = "de"
    config.max_prompt_tokens = 48
    config.max_response_tokens = 96
    config.buckets = ((16, 24), (16, 32), (24, 40), (24, 56), (48, 96))
    config.scan_layers = True

    config.llm.path = "checkpoints/smollm2"
    config.llm.train.update(
        steps=1350,
        batch_size=32,
        learning_rate=3e-4,
        parameter_scale=False,
        # An average of the last hundreds of steps does what a falling rate would, and training
        # can go on from any of them.
        schedule="constant",
        warmup_steps=50,
        ema_decay=0.99,
        label_smoothing=0.1,
        dropout_rate=0.0,
        evaluate_every=75,
        log_every=5,
    )
    # What half of the LLM's layers know of a sentence is enough, and costs half of the reading.
    config.llm.layer = 0.5
    config.labels.update(source="llm", batch_size=64)
    config.features.cache = "runs/features"

    config.slm.cut.num_layers = 6
    config.slm.vocabulary = "task"
    for section in (config.slm, config.l2s):
        section.train.update(
            steps=2700,
            batch_size=32,
            learning_rate=5e-4,
            parameter_scale=False,
            warmup_steps=100,
            label_smoothing=0.1,
            dropout_rate=0.0,
            evaluate_every=300,
            log_every=10,
        )
    # What is left of the LLM would be lost under the Z of a random projector.
    config.l2s.zero_start = True
    config.decoding.update(max_new_tokens=96, batch_size=64)
    config.evaluation.latency.update(prompt_tokens=16, new_tokens=32)
    return config
