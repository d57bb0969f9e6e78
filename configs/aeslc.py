"""AESLC, an e-mail's body to its subject line, all three models from scratch.

    python -m l2s_jax.main --config=configs/aeslc.py --workdir=runs/aeslc

The data: JSON Lines with the fields id, body, subject, and in dev and test references (a list of
three more subjects), as gzip files in config.task.data_dir.
"""

from ml_collections import ConfigDict

from l2s_jax.config import default


def get_config() -> ConfigDict:
    config = default()
    config.task.name = "aeslc"
    config.task.source = "jsonl"
    config.task.data_dir = "data/aeslc"
    config.task.splits = ConfigDict(
        {"train": "train.jsonl.gz", "validation": "dev.jsonl.gz", "test": "test.jsonl.gz"}
    )
    config.task.prompt = "{body}"
    config.task.response = "subject"
    config.task.references = "references"
    config.tokenizer.train_vocab_size = 8000
    # Longer bodies are truncated: what a mail is about mostly stands at its beginning.
    config.max_prompt_tokens = 128
    config.max_response_tokens = 32
    config.buckets = ((32, 16), (64, 16), (128, 16), (128, 32))

    config.llm.model.update(
        width=128,
        num_heads=4,
        head_width=32,
        feed_forward_width=512,
        num_encoder_layers=4,
        num_decoder_layers=4,
    )
    config.llm.train.update(
        steps=2000,
        batch_size=64,
        learning_rate=2e-2,
        warmup_steps=200,
        label_smoothing=0.1,
        dropout_rate=0.1,
        ema_decay=0.998,
        evaluate_every=250,
        log_every=20,
    )
    config.slm.model.update(
        width=96,
        num_heads=4,
        head_width=24,
        feed_forward_width=256,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    for section in (config.slm, config.l2s):
        section.train.update(
            steps=2000,
            batch_size=64,
            learning_rate=2e-2,
            warmup_steps=200,
            label_smoothing=0.1,
            dropout_rate=0.1,
            ema_decay=0.998,
            evaluate_every=250,
            log_every=20,
        )
    config.l2s.projector_width = 128
    config.decoding.max_new_tokens = 32
    config.evaluation.metrics = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    config.evaluation.latency.update(prompt_tokens=128, new_tokens=8)
    return config
