r"""WMT14, English to German, T5-Large -> T5-small, on responses that T5-Large gives.

    for size in large small; do hf download google-t5/t5-$size config.json model.safetensors \
        spiece.model --local-dir checkpoints/t5-$size; done
    tfds build wmt14_translate/de-en --file_format=array_record
    python -m l2s_jax.main --config=configs/wmt14_en_de.py --workdir=runs/wmt14_en_de

`hf` comes with huggingface_hub. `tfds build` downloads and prepares the data, for which TFDS needs
TensorFlow: run it where both are installed; nothing else here does. The prompt is T5's own, so that
T5-Large needs no training. The other configs for these two models start from this one.
"""

from ml_collections import ConfigDict

from l2s_jax.config import default


def get_config() -> ConfigDict:
    config = default()
    config.task.name = "wmt14_en_de"
    config.task.source = "tfds"
    config.task.tfds_name = "wmt14_translate/de-en"
    # TFDS keeps the set shuffled. T5-Large answers all of these prompts before training begins.
    config.task.splits = ConfigDict(
        {"train": "train[:1000000]", "validation": "validation", "test": "test"}
    )
    config.task.prompt = "translate English to German: {en}"
    config.task.response = "de"
    config.labels.update(source="llm", batch_size=256)
    config.max_prompt_tokens = 128
    config.max_response_tokens = 128
    config.buckets = ((32, 32), (64, 64), (128, 128))

    config.llm.path = "checkpoints/t5-large"
    config.slm.path = "checkpoints/t5-small"
    config.l2s.projector_width = 1024
    # The optimizer's settings are those of T5's own fine-tuning (arXiv 1910.10683, section 3.1):
    # Adafactor clips each update by itself, and no gradient is clipped before.
    for section in (config.slm, config.l2s):
        section.train.update(
            steps=50_000,
            batch_size=128,
            optimizer="adafactor",
            learning_rate=1e-3,
            schedule="constant",
            clip_norm=0.0,
            dropout_rate=0.1,
            evaluate_every=2500,
            log_every=50,
        )
    config.decoding.max_new_tokens = 128
    config.decoding.batch_size = 256
    return config
