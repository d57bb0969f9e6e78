"""Multi30k, English to German, all three models from scratch (about an hour on 2 CPU cores).

    python -m l2s_jax.main --config=configs/multi30k_en_de.py --workdir=runs/multi30k_en_de

The data: github.com/multi30k/dataset, folder data/task1/raw (gzip files, line-aligned), in
config.task.data_dir.
"""

from ml_collections import ConfigDict

from l2s_jax.config import default


def get_config() -> ConfigDict:
    config = default()
    config.task.name = "multi30k_en_de"
    config.task.source = "text"
    config.task.data_dir = "data/multi30k"
    config.task.splits = ConfigDict(
        {
            "train": {"en": "train.en.gz", "de": "train.de.gz"},
            "validation": {"en": "val.en.gz", "de": "val.de.gz"},
            "test": {"en": "test_2016_flickr.en.gz", "de": "test_2016_flickr.de.gz"},
        }
    )
    config.task.prompt = "{en}"
    config.task.response = "de"
    config.tokenizer.train_vocab_size = 4000
    config.max_prompt_tokens = 64
    config.max_response_tokens = 64
    config.buckets = ((16, 16), (20, 20), (24, 24), (32, 32), (64, 64))

    config.llm.model.update(
        width=128,
        num_heads=4,
        head_width=32,
        feed_forward_width=256,
        num_encoder_layers=4,
        num_decoder_layers=8,
    )
    config.llm.train.update(
        steps=5000,
        batch_size=64,
        learning_rate=2e-2,
        warmup_steps=400,
        label_smoothing=0.1,
        dropout_rate=0.1,
        ema_decay=0.998,
        evaluate_every=500,
        log_every=20,
    )
    config.slm.model.update(
        width=112,
        num_heads=4,
        head_width=28,
        feed_forward_width=256,
        num_encoder_layers=1,
        num_decoder_layers=2,
    )
    for section in (config.slm, config.l2s):
        section.train.update(
            steps=6000,
            batch_size=64,
            learning_rate=2e-2,
            warmup_steps=400,
            label_smoothing=0.1,
            dropout_rate=0.05,
            ema_decay=0.998,
            evaluate_every=600,
            log_every=20,
        )
    config.l2s.projector_width = 256
    config.labels.update(source="llm", batch_size=96)
    config.decoding.update(max_new_tokens=64, batch_size=96)
    config.evaluation.latency.update(prompt_tokens=24, new_tokens=24)
    return config
