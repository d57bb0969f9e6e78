"""AESLC, an e-mail's body to its subject line, with a pretrained LLM: SmolLM2-135M-Instruct.

    python -m l2s_jax.convert --input="$(launch/smollm2.sh)" --output=checkpoints/smollm2 --to=hf
    python -m l2s_jax.main --config=configs/aeslc_smollm2.py --workdir=runs/aeslc_smollm2

The data are those of configs/aeslc.py.
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
    config.task.prompt = "{body}\nSubject:"
    config.task.response = "subject"
    config.task.references = "references"
    # A longer body loses its end: what a mail is about mostly stands at its beginning.
    config.max_prompt_tokens = 64
    config.max_response_tokens = 32
    config.buckets = ((32, 16), (64, 16), (64, 32))
    config.scan_layers = True

    config.llm.path = "checkpoints/smollm2"
    config.llm.train.update(
        steps=400,
        batch_size=16,
        learning_rate=3e-4,
        parameter_scale=False,
        schedule="constant",
        warmup_steps=50,
        ema_decay=0.99,
        label_smoothing=0.1,
        dropout_rate=0.0,
        evaluate_every=200,
        log_every=5,
    )
    config.llm.layer = 0.5
    config.labels.update(source="llm", batch_size=32)
    config.features.cache = "runs/features"

    config.slm.cut.num_layers = 6
    config.slm.vocabulary = "8192"
    for section in (config.slm, config.l2s):
        section.train.update(
            steps=700,
            batch_size=32,
            learning_rate=5e-4,
            parameter_scale=False,
            warmup_steps=100,
            label_smoothing=0.1,
            dropout_rate=0.0,
            evaluate_every=350,
            log_every=10,
        )
    # What is left of the LLM would be lost under the Z of a random projector.
    config.l2s.zero_start = True
    config.decoding.max_new_tokens = 32
    config.evaluation.metrics = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    config.evaluation.latency.update(prompt_tokens=64, new_tokens=8)
    return config
