"""Alpaca instructions: Flan-T5-XL encodes, GPT-2 decodes, each with its own tokenizer.

    python -m l2s_jax.main --config=configs/alpaca_gpt2.py --workdir=runs/alpaca_gpt2

checkpoints/flan-t5-xl and checkpoints/gpt2 are directories from huggingface.co/google/flan-t5-xl
and huggingface.co/openai-community/gpt2. The data: alpaca_data.json of
github.com/tatsu-lab/stanford_alpaca, split into train.jsonl, validation.jsonl and test.jsonl with
one JSON object per line, in config.task.data_dir.
"""

from ml_collections import ConfigDict

from l2s_jax.config import default


def get_config() -> ConfigDict:
    config = default()
    config.task.update(name="alpaca_gpt2", source="jsonl", data_dir="data/alpaca")
    config.task.splits = ConfigDict(
        {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    )
    config.task.prompt = "{instruction} {input}"
    config.task.response = "output"
    config.max_prompt_tokens = 256
    config.max_response_tokens = 256
    config.buckets = ((64, 64), (64, 256), (256, 256))

    config.llm.path = "checkpoints/flan-t5-xl"
    config.slm.path = "checkpoints/gpt2"
    config.labels.update(source="llm", batch_size=64)
    # Pretrained checkpoints are changed less than models that start from nothing.
    for section in (config.slm, config.l2s):
        section.train.update(
            steps=20_000,
            batch_size=64,
            parameter_scale=False,
            learning_rate=1e-4,
            warmup_steps=1_000,
            dropout_rate=0.1,
            evaluate_every=1_000,
        )
    config.decoding.update(max_new_tokens=256, batch_size=64)
    config.evaluation.metrics = ("rougeL", "rouge1", "rouge2")
    config.evaluation.latency.update(prompt_tokens=64, new_tokens=128)
    return config
