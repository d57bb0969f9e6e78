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
    config.tokenizer.train_vocab_size = 180
    config.max_prompt_tokens = 40
    config.max_response_tokens = 40
    config.buckets = ((40, 40),)

    config.llm.model.update(
        width=128,
        num_heads=4,
        head_width=32,
        feed_forward_width=256,
        num_encoder_layers=4,
        num_decoder_layers=4,
    )
    config.llm.train.update(
        steps=1500, batch_size=64, learning_rate=2e-3, warmup_steps=200, dropout_rate=0.0
    )
    config.slm.model.update(
        width=64,
        num_heads=4,
        head_width=16,
        feed_forward_width=128,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    for section in (config.slm, config.l2s):
        section.train.update(
            steps=1000, batch_size=64, learning_rate=3e-3, warmup_steps=100, dropout_rate=0.0
        )
    config.l2s.projector_width = 128
    config.decoding.max_new_tokens = 40
    config.evaluation.metrics = ("bleu", "exact_match")
    return config
