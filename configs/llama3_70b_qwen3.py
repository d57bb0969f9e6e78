r"""Alpaca instructions: the lower half of Llama-3-70B-Instruct encodes, Qwen3-0.6B decodes.

    python -m l2s_jax.main --config=configs/llama3_70b_qwen3.py --workdir=runs/llama3_70b_qwen3
    python -m l2s_jax.main --mode=plan --config=configs/llama3_70b_qwen3.py \
        --workdir=runs/plan --topology=v5p:2x2x4

As alpaca_gpt2.py, with checkpoints/llama-3-70b-instruct
(huggingface.co/meta-llama/Meta-Llama-3-70B-Instruct) as the LLM and checkpoints/qwen3-0.6b
(huggingface.co/Qwen/Qwen3-0.6B) as the SLM. A plan needs neither. Each has its own vocabulary, so
that the SLM reads the LLM's embedding of the prompt through a learned map. Prompts are chats: the
base model, Meta-Llama-3-70B, would go on writing the instruction instead of following it.
"""

from ml_collections import ConfigDict

from configs import alpaca_gpt2


def get_config() -> ConfigDict:
    config = alpaca_gpt2.get_config()
    config.task.name = "llama3_70b_qwen3"
    config.task.prompt = ""
    config.task.chat.user = "{instruction}\n\n{input}"
    config.llm.path = "checkpoints/llama-3-70b-instruct"
    config.llm.layer = 0.5
    config.slm.path = "checkpoints/qwen3-0.6b"
    for section in (config.slm.train, config.l2s.train, config.labels, config.decoding):
        section.batch_size = 256
    config.mesh.update(data=1, fsdp=-1)
    # Along fsdp each token would bring the whole LLM to each chip.
    for section in (config.labels, config.decoding):
        section.mesh.update(data=-1, fsdp=1, tensor=8)
    config.scan_layers = True
    config.l2s.train.remat = True
    return config
