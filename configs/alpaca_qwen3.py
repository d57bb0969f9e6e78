"""Alpaca instructions: the lower half of Qwen3-8B encodes, Qwen3-0.6B decodes; one tokenizer.

    python -m l2s_jax.main --config=configs/alpaca_qwen3.py --workdir=runs/alpaca_qwen3

As alpaca_gpt2.py, with checkpoints/qwen3-8b (huggingface.co/Qwen/Qwen3-8B) as the LLM and
checkpoints/qwen3-0.6b (huggingface.co/Qwen/Qwen3-0.6B) as the SLM. Prompts are chats, in which the
models answer without thinking aloud first.
"""

from ml_collections import ConfigDict

from configs import alpaca_gpt2


def get_config() -> ConfigDict:
    config = alpaca_gpt2.get_config()
    config.task.name = "alpaca_qwen3"
    config.task.prompt = ""
    config.task.chat.user = "{instruction}\n\n{input}"
    config.task.chat.options = ConfigDict({"enable_thinking": False})
    config.llm.path = "checkpoints/qwen3-8b"
    config.llm.layer = 0.5
    config.slm.path = "checkpoints/qwen3-0.6b"
    return config
