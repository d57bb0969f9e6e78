"""Labelling as a process of its own, for test_labels to kill.

python tests/label_child.py DIRECTORY
"""

import json
import os
import sys
import time

from l2s_jax.data.table import Example
from l2s_jax.experiment import label_files
from l2s_jax.serving.generator import Output

SHARD = 4
SECONDS = 0.1  # that a file of labels takes
EXAMPLES = [Example(f"prompt {i}", "old", ("old",)) for i in range(98)]


class Slow:
    """Answers one prompt after another, and notes each in asked.txt."""

    def __init__(self, directory):
        self.asked = os.path.join(directory, "asked.txt")

    def answered(self, prompts, *, description, part):
        for place in range(part[0], len(prompts), part[1]):
            with open(self.asked, "a", encoding="utf-8") as file:
                file.write(f"{prompts[place]}\n")
            time.sleep(SECONDS / SHARD)
            yield [place], [Output(f"answer to {prompts[place]}", 1, False)]


def label(examples, make_generator, directory, **settings):
    """The examples with labels, of which those that are missing are made."""
    label_files.fill(examples, make_generator, directory, **settings)
    prompts = [example.prompt for example in examples]
    keys = label_files.Keys(prompts, sampled=settings.get("seed") is not None)
    store = label_files.LabelFiles(directory, settings.get("split", "train"))
    return label_files.Labelled(examples, keys, store)


if __name__ == "__main__":
    label_files.SHARD = SHARD
    labelled = label(EXAMPLES, lambda: Slow(sys.argv[1]), sys.argv[1])
    with open(os.path.join(sys.argv[1], "labelled.json"), "w", encoding="utf-8") as file:
        json.dump([example.response for example in labelled], file)
