"""The bundled synthetic task, all three models from scratch: minutes on 2 CPU cores.

python -m l2s_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from l2s_jax.config import default


def get_config() -> ConfigDict:
    config = default()
    config.task.name = "l2s_synthetic"
    config.task.source = "tfds"
    config.task.tfds_name = "l2s_synthetic"
    config.task.splits = ConfigDict({"train": "train", "validation": "validation", "test": "test"})
    config.task.prompt = "{source}"
    config.task.response = "target"
    config.tokenizer.update(train_vocab_size=600, model_type="bpe")
    config.max_prompt_tokens = 20
    config.max_response_tokens = 20
    config.buckets = ((20, 20),)

    config.llm.model.update(
        width=128,
        num_heads=4,
        head_width=32,
        feed_forward_width=256,
        num_encoder_layers=4,
        num_decoder_layers=3,
    )
    config.llm.train.update(steps=900, warmup_steps=100, evaluate_every=300)
    config.slm.model.update(
        width=64,
        num_heads=4,
        head_width=16,
        feed_forward_width=128,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    config.slm.train.update(steps=1400, warmup_steps=100, evaluate_every=350)
    config.l2s.train.update(steps=1400, warmup_steps=100, evaluate_every=350)
    for section in (config.llm, config.slm, config.l2s):
        section.train.update(batch_size=64, learning_rate=2e-2, dropout_rate=0.0)
    config.l2s.projector_width = 128
    config.decoding.update(max_new_tokens=20, batch_size=96)
    config.evaluation.metrics = ("exact_match", "bleu")
    config.evaluation.latency.update(prompt_tokens=20, new_tokens=20)
    return config
