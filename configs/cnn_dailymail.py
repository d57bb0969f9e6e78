"""CNN/DailyMail, T5-Large -> T5-small (configs/wmt14_en_de.py says how to get them).

tfds build cnn_dailymail --file_format=array_record
python -m l2s_jax.main --config=configs/cnn_dailymail.py --workdir=runs/cnn_dailymail
"""

from ml_collections import ConfigDict

from configs import wmt14_en_de


def get_config() -> ConfigDict:
    config = wmt14_en_de.get_config()
    config.task.name = "cnn_dailymail"
    config.task.tfds_name = "cnn_dailymail"
    config.task.splits.train = "train"
    config.task.prompt = "summarize: {article}"
    config.task.response = "highlights"
    # The lengths that T5 was trained with on this task; longer articles are truncated.
    config.max_prompt_tokens = 512
    config.max_response_tokens = 128
    config.buckets = ((512, 128),)
    for section in (config.slm, config.l2s):
        section.train.batch_size = 64
    config.labels.batch_size = config.decoding.batch_size = 64
    config.evaluation.metrics = ("rougeLsum", "rouge1", "rouge2", "rougeL")
    config.evaluation.latency.update(prompt_tokens=512, new_tokens=64)
    return config
