"""Multi30k, English to German, with a larger LLM: 60M parameters, and an SLM a tenth of that.

    python -m l2s_jax.main --config=configs/multi30k_en_de_60m.py --workdir=runs/multi30k_en_de_60m

All three models from scratch, as in multi30k_en_de.py, for one GPU: "auto" makes it bfloat16 there.
Not yet run, so that the settings are guesses: dropout, as 29,000 sentences are few for 60M
parameters; the rates are T5's own for this width, and those of multi30k_en_de.py for the SLM.

How long a seed should take on an H100, counted in products: a batch has 256 x 26 tokens on either
side. LLM: 3,000 steps of 2.4 TFLOP. SLM and L2S: 4,000 steps each, of 0.23 and 0.51. That is 10
PFLOP, 50 to 100 seconds where models of this size reach 10 to 20% of the chip's peak. Labels,
validation, checkpoints and compilation are expected to take twice as long again.
"""

from ml_collections import ConfigDict

from configs import multi30k_en_de


def get_config() -> ConfigDict:
    config = multi30k_en_de.get_config()
    config.tokenizer.train_vocab_size = 8000
    config.max_prompt_tokens = 48
    config.max_response_tokens = 48
    # Nine of ten pairs fit into the first. Each shape is compiled, so that there are few.
    config.buckets = ((24, 24), (48, 48))

    config.llm.model.update(
        width=512,
        num_heads=8,
        head_width=64,
        feed_forward_width=2304,
        num_encoder_layers=6,
        num_decoder_layers=8,
    )
    config.llm.train.update(
        steps=3000,
        batch_size=256,
        learning_rate=1e-2,
        warmup_steps=500,
        label_smoothing=0.1,
        dropout_rate=0.3,
        evaluate_every=500,
    )
    config.slm.model.update(
        width=256,
        num_heads=4,
        head_width=64,
        feed_forward_width=1024,
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
    for section in (config.slm, config.l2s):
        section.train.update(
            steps=4000,
            batch_size=256,
            learning_rate=2e-2,
            warmup_steps=500,
            label_smoothing=0.1,
            dropout_rate=0.1,
            evaluate_every=1000,
        )
    config.l2s.projector_width = 512
    config.labels.batch_size = 256
    config.decoding.update(max_new_tokens=48, batch_size=256)
    return config
