"""How the tests are run: the order of the files, and what is left of one for the next."""

import pathlib
from types import SimpleNamespace

import conftest
import jax
import jax.numpy as jnp
import pytest

from l2s_jax.cluster import distributed

TESTS = pathlib.Path(__file__).parent


def test_long_files_come_first_then_those_with_many_tests_each_as_a_whole():
    names = [f"test_{name}" for name in conftest.LONG.split()]
    assert len(set(names)) == len(names)
    assert all((TESTS / f"{name}.py").exists() for name in names)
    files = {names[1]: 2, names[0]: 1, "test_few": 3, "test_many": 4, "test_few_too": 3}
    items = [
        SimpleNamespace(path=TESTS / f"{name}.py", number=number)
        for name, count in files.items()
        for number in range(count)
    ]
    conftest.pytest_collection_modifyitems(items)
    order = [names[0], names[1], "test_many", "test_few", "test_few_too"]
    expected = [(name, number) for name in order for number in range(files[name])]
    assert [(item.path.stem, item.number) for item in items] == expected


def test_programs_are_kept_until_they_take_many_pieces_of_memory(monkeypatch):
    traced = []

    @jax.jit
    def twice(x):
        traced.append(x.shape)
        return 2 * x

    def next_file():
        list(conftest._programs_go_in_time.__wrapped__())
        twice(jnp.ones(3))

    assert conftest._maps() > 100
    monkeypatch.setattr(conftest, "MOST_MAPS", 10**9)
    next_file()
    next_file()
    assert len(traced) == 1
    monkeypatch.setattr(conftest, "MOST_MAPS", 1)
    next_file()
    assert len(traced) == 2


@pytest.mark.parametrize("on_primary", [conftest.on_primary, conftest.alone])
def test_what_process_0_does_for_all_asks_the_others_for_nothing(on_primary, monkeypatch):
    """By its tests, and in a job, where it would wait for ever."""
    state = SimpleNamespace(global_state=SimpleNamespace(client=object()))
    monkeypatch.setattr(distributed, "runtime", state)
    monkeypatch.setattr(distributed, "exchange", lambda value: [value])
    with pytest.raises((AssertionError, RuntimeError), match=r"^on_primary within on_primary: "):
        on_primary(lambda: on_primary(lambda: 1))
    assert on_primary(lambda: 1) == 1
