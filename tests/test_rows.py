"""What the LLM makes of a batch stays where it was made: each process writes rows of its own."""

import re
import sys
from collections import Counter

import jax
import numpy as np
import pytest
import rows_child
import small
from test_distributed import TESTS, ended, free_port, start

from l2s_jax.cluster import sharding
from l2s_jax.experiment import feature_cache, scoring
from l2s_jax.experiment.feature_files import FeatureFiles
from l2s_jax.training.distillation import divergence

DATA = rows_child.DATA
# How much of the data another run made before.
BEFORE = 30


def gathered(program, *arguments):
    """Shapes that a compiled program gathers on a mesh."""
    text = program.lower(*arguments).compile().as_text()
    found = re.findall(r" = \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    return [tuple(map(int, shape.split(","))) for shape in found]


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)])
def test_nothing_of_a_batch_is_gathered_on_a_mesh(sizes):
    rows, mesh = 16, small.mesh_of(*sizes)
    l2s, llm = small.make_system("add"), small.make_system("llm")
    batch = sharding.put_batch(small.make_batch(llm, rows, 20, 12), mesh)
    ids, mask = batch["llm_ids"], batch["llm_mask"]
    encoder = feature_cache.Encoder(l2s.llm_config, small.make_params(l2s)[1], mesh)
    params = sharding.put_parameters(small.make_params(llm)[0], mesh)
    scorer = scoring.Scorer(llm, params, mesh, top_k=5, temperature=1.0)
    held = sharding.batch_sharding(mesh)
    for x in (encoder(ids, mask), *scorer(batch)):
        assert x.shape[0] == rows and x.sharding.is_equivalent_to(held, x.ndim)
    with jax.set_mesh(mesh):
        shapes = [
            *gathered(encoder._encode, encoder._frozen, ids, mask),
            *gathered(scorer._score, params, batch),
        ]
    # Parameters, which are matrices, may be.
    assert not [shape for shape in shapes if len(shape) > 2 and shape[0] == rows]
    if mesh.shape["data"] == mesh.size:
        assert shapes == []


def test_of_a_divergence_and_its_gradient_nothing_is_gathered():
    mesh, rows = small.mesh_of(8, 1, 1), 16
    shapes = {
        "logits": (rows, 6, 40),
        "mask": (rows, 6),
        "ids": (rows, 6, 5),
        "probs": (rows, 6, 5),
    }
    dtypes = {"mask": bool, "ids": np.int32}
    arrays = [
        sharding.put(np.ones(shape, dtypes.get(name, np.float32)), sharding.batch_sharding(mesh))
        for name, shape in shapes.items()
    ]
    gradient = jax.jit(jax.value_and_grad(lambda *of: divergence(*of, 1.0)))
    with jax.set_mesh(mesh):
        assert gathered(gradient, *arrays) == []


def first(count):
    return small.make_data(small.random_pairs(98, 7)[:count], (8, 8))


def filled(directory, count, **settings):
    """By one process."""
    mesh = small.mesh_of()
    data = DATA if count is None else first(count)
    return (
        rows_child.features(str(directory), mesh, data, **settings),
        rows_child.logits(str(directory), mesh, data),
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(what one process makes of all, the folder of jobs of two and of four)."""
    root = tmp_path_factory.mktemp("rows")
    directory = root / "jobs"
    filled(directory / "rows", BEFORE)
    for processes, status in ((2, 2), (4, 0)):
        where = f"127.0.0.1:{free_port()}"
        child = [sys.executable, str(TESTS / "rows_child.py"), str(directory), where]
        results = ended([start([*child, str(processes), str(i)]) for i in range(processes)])
        assert [result[0] for result in results] == [status] * processes, results
    return filled(root / "one", None), directory


def wrote(folder):
    """(kind, process, number, keys) of each shard."""
    lines = [line.split() for line in (folder / "wrote.txt").read_text().splitlines()]
    return [(kind, int(process), int(n), keys) for kind, process, n, *keys in lines]


def order(kind, before):
    """Keys of what is made in the order in which batches have them; `before` is there already."""
    prompts, responses = DATA.prompt_lengths, DATA.response_lengths
    keys = [key.tobytes().hex() for key in getattr(DATA, f"{kind}_keys")]
    places = [i for i, key in enumerate(keys) if keys.index(key) == i and key not in before]
    by = {"prompt": lambda i: prompts[i], "pair": lambda i: max(prompts[i], responses[i]) > 4}
    return [keys[i] for i in sorted(places, key=by[kind])]


@pytest.mark.parametrize(
    ("name", "owners"),
    [("rows", [0] * 4 + [1] * 4), ("copies", [0] * 8), ("both", [0] * 4 + [2] * 4)],
)
def test_each_process_writes_the_rows_that_it_has_first(job, name, owners):
    """Along `tensor` two processes have the same rows: one of them writes nothing."""
    _, directory = job
    shards = wrote(directory / name)
    earlier = first(BEFORE) if name == "rows" else first(0)
    for kind, store in (("prompt", "features"), ("pair", "logits")):
        before = {key.tobytes().hex() for key in getattr(earlier, f"{kind}_keys")}
        made = order(kind, before)
        found = {key: process for what, process, _, keys in shards if what == store for key in keys}
        assert found == {key: owners[i % 8] for i, key in enumerate(made)}
        # None has the number of another, or of one that was there.
        numbers = [number for what, _, number, _ in shards if what == store]
        there = {
            int(path.name.split("-")[1]) for path in directory.glob(f"{name}/**/{store}-*.index")
        }
        assert len(there) - len(numbers) == (name == "rows") and len(numbers) > 2 * len(set(owners))


def assert_equal_to_rounding(found, expected):
    kept, teacher = found
    other, other_teacher = expected
    for index in range(len(DATA)):
        np.testing.assert_allclose(
            kept[index].astype(np.float32), other[index].astype(np.float32), rtol=2**-7, atol=1e-5
        )
        for values, others in zip(teacher[index], other_teacher[index], strict=True):
            np.testing.assert_allclose(values, others, rtol=2**-9, atol=1e-3)


@pytest.mark.parametrize("name", ["rows", "copies", "both"])
def test_all_have_written_what_one_process_makes(job, name):
    one, directory = job
    # All is there: what encodes would fail at once.
    assert_equal_to_rounding(filled(directory / name, None, most=0), one)


def test_stopped_others_go_on_with_what_is_left(job):
    """Two were stopped at other batches, and while one wrote a shard; one alone goes on."""
    one, directory = job
    (folder,) = (directory / "stopped" / "features").iterdir()
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    (folder / "features-00003-01234567.array_record.0123.tmp").write_bytes(b"half")
    (folder / "features-00003-01234567.index").write_bytes(b"k" * 16)
    store = FeatureFiles(str(folder))
    numbers = {int(path.name[9:14]) % 2 for path in shards}
    assert numbers == {0, 1} and len(store.keys([*map(str, shards)])) < len(DATA)
    assert_equal_to_rounding(filled(directory / "stopped", None), one)
    assert shards.items() <= {path: path.stat().st_mtime_ns for path in folder.iterdir()}.items()
    assert not list(folder.glob("*.tmp"))
    counts = Counter(store.keys(store.files()).tolist())
    assert set(counts) == set(DATA.prompt_keys.tolist()) and set(counts.values()) == {1}
