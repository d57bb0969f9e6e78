"""One process of a job that labels, reads, encodes and trains, for test_distributed to kill.

python tests/job_child.py DIRECTORY SECONDS_PER_STEP COORDINATOR PROCESSES PROCESS
"""

import json
import os
import sys

import features_child
import jax
import label_child
import numpy as np
import small
import train_child

from l2s_jax import sealed
from l2s_jax.checkpoints import pretrained
from l2s_jax.checkpoints.files import TensorFiles
from l2s_jax.cluster import distributed
from l2s_jax.cluster.job import job
from l2s_jax.cluster.limits import Limits
from l2s_jax.cluster.paths import path_name
from l2s_jax.data.table import Example
from l2s_jax.data.tokens import Tokenization
from l2s_jax.experiment import feature_cache, label_files, token_files

# Two of four processes hold the same rows of a batch, and parts of the same parameters.
MESHES = {4: (2, 1, 2), 2: (1, 2, 1)}

TEXTS = [Example(prompt, response, ()) for prompt, response in small.random_pairs(50, 8)]


def read_encoder(directory, process, mesh):
    """Keeps this process's part of an encoder.

    Gives how many bytes it is, how many were read, and how many files for their hashes.
    """
    read, whole = [], TensorFiles.read

    def counted(self, key, index):
        read.append(whole(self, key, index))
        return read[-1]

    TensorFiles.read = counted
    known = set(sealed._known)
    _, params = pretrained.load_encoder(f"{directory}/llm", mesh=small.mesh_of(*mesh))
    hashed = len(set(sealed._known) - known)
    kept = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        (shard,) = leaf.addressable_shards
        kept[path_name(path)] = shard.data
        starts = [axis.indices(size)[0] for axis, size in zip(shard.index, leaf.shape, strict=True)]
        kept[f"{path_name(path)} from"] = np.array(starts)
    np.savez(f"{directory}/encoder-{process}.npz", **kept)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    return {"held": held, "read": sum(part.nbytes for part in read), "hashed": hashed}


def encode(directory, mesh):
    """The LLM's H of prompts in many shards."""
    features_child.small_shards()
    system, mesh = small.make_system("add"), small.mesh_of(*mesh)
    frozen = small.make_params(system)[1]
    return feature_cache.cached(
        features_child.DATA,
        f"{directory}/features",
        features_child.FACTS,
        lambda: feature_cache.Encoder(system.llm_config, frozen, mesh),
        mesh=mesh,
        split="train",
        width=features_child.WIDTH,
        buckets=[8],
        batch_size=8,
    )


def label(directory, asked, **settings):
    """The examples with labels that lie in a directory; `asked` is where asked.txt is."""
    os.makedirs(asked, exist_ok=True)
    return label_child.label(
        label_child.EXAMPLES,
        lambda: label_child.Slow(asked),
        directory,
        **settings,
    )


def tokenize(directory, process):
    """The tokens of the features' prompts, in small files; tokenized.txt has who made how many."""
    token_files.AT_ONCE = 4
    tokenizer = small.NumberTokenizer()
    how = Tokenization(tokenizer, tokenizer, 8, 8)

    def noted(examples):
        with open(f"{directory}/tokenized.txt", "a", encoding="utf-8") as file:
            file.write(f"{process} {len(examples)}\n")
        return how(examples)

    tokens = token_files.kept(f"{directory}/tokens", {}, TEXTS, noted)
    return [tokens.prompts[i].tolist() for i in range(len(TEXTS))]


def main(directory, seconds, coordinator, processes, process):
    with job(coordinator, processes, process, limits=Limits(heartbeat_s=10)):
        labelled = label(f"{directory}/labels", f"{directory}/labels")
        own = f"{directory}/together/{process}"
        assert list(labelled) == list(label(f"{directory}/together", own, together=True))
        facts = read_encoder(directory, process, MESHES[processes])
        facts |= {"devices": jax.device_count(), "own": jax.local_device_count()}
        kept = encode(directory, MESHES[processes])
        distributed.check_same({"tokens": tokenize(directory, process)})
        distributed.check_same({"features": [float(h.astype(float).sum()) for h in kept]})
        weights = train_child.run(directory, seconds, mesh=MESHES[processes])
        distributed.check_same({"labels": [example.response for example in labelled]})
        np.savez(f"{directory}/weights-{process}.npz", *jax.tree.leaves(weights))
        with open(f"{directory}/facts-{process}.json", "w", encoding="utf-8") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    label_child.SECONDS = 0.0
    label_files.SHARD = label_child.SHARD
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
