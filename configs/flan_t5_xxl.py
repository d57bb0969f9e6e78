r"""Alpaca instructions: Flan-T5-XXL encodes, T5-base decodes; one vocabulary.

    python -m l2s_jax.main --config=configs/flan_t5_xxl.py --workdir=runs/flan_t5_xxl
    python -m l2s_jax.main --mode=plan --config=configs/flan_t5_xxl.py \
        --workdir=runs/plan --topology=v5e:4x4

As alpaca_gpt2.py, with checkpoints/flan-t5-xxl (huggingface.co/google/flan-t5-xxl) as the LLM and
checkpoints/t5-base (huggingface.co/google-t5/t5-base) as the SLM. A plan needs neither.
"""

from ml_collections import ConfigDict

from configs import alpaca_gpt2


def get_config() -> ConfigDict:
    config = alpaca_gpt2.get_config()
    config.task.name = "flan_t5_xxl"
    config.llm.path = "checkpoints/flan-t5-xxl"
    config.slm.path = "checkpoints/t5-base"
    for section in (config.slm.train, config.l2s.train, config.labels, config.decoding):
        section.batch_size = 256
    config.mesh.update(data=1, fsdp=-1)
    # Along fsdp each token would bring the whole LLM to each chip.
    for section in (config.labels, config.decoding):
        section.mesh.update(data=-1, fsdp=1, tensor=8)
    config.scan_layers = True
    config.l2s.train.remat = True
    return config
