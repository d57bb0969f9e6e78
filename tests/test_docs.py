"""The pages in docs/ and the README: their code runs, and the settings that they name are there."""

from __future__ import annotations

import pathlib
import re
import runpy
import shlex
import sys
import types

import pytest
import shapes
from ml_collections import ConfigDict

from l2s_jax.checkpoints import configs
from l2s_jax.config import default
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.models import families

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def sections(path: pathlib.Path) -> dict[str, str]:
    """Heading -> text of each section of a page."""
    _, *parts = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {part.partition("\n")[0]: part for part in parts}


EXAMPLES = {
    name: blocks(text, "python")
    for name, text in sections(ROOT / "docs" / "development.md").items()
    if name.startswith("Add ")
}


def test_each_kind_of_part_has_an_example() -> None:
    assert set(EXAMPLES) == {"Add a family", "Add a fusion", "Add a stage", "Add a metric"}
    assert all("assert" in code[-1] for code in EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "enabled", False)
    # What an example registers is gone when it ends.
    monkeypatch.setattr(families, "CONFIGS", dict(families.CONFIGS))
    monkeypatch.setattr(families, "_MODULES", dict(families._MODULES))
    monkeypatch.setattr(configs, "FAMILIES", configs.FAMILIES)
    example = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", example)
    for code in EXAMPLES[name]:
        exec(compile(code, name, "exec", dont_inherit=True), vars(example))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_is_python(path: pathlib.Path) -> None:
    for code in blocks(path.read_text(encoding="utf-8"), "python"):
        compile(code, str(path), "exec")


CONFIGS = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in PAGES
    for number, code in enumerate(blocks(path.read_text(encoding="utf-8"), "python"))
    if "def get_config" in code
]


@pytest.mark.parametrize("code", CONFIGS)
def test_configs_are_usable(code: str, tmp_path: pathlib.Path) -> None:
    namespace: dict = {}
    exec(code, namespace)
    config = namespace["get_config"]()
    if config.llm.path:
        Experiment(config, str(tmp_path))
    else:  # an excerpt
        assert config != default()


def overrides() -> list[str]:
    """Keys that commands of the pages set, and keys that they name as `config.KEY`."""
    found = set()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for code in blocks(text, "bash"):
            words = [
                word for line in code.splitlines() for word in shlex.split(line, comments=True)
            ]
            found |= {word.partition("=")[0] for word in words if word.startswith("--config.")}
        found |= set(re.findall(r"`(--config\.[\w.]+)=", text))
    return sorted(key.removeprefix("--config.") for key in found)


@pytest.mark.parametrize("key", [key for key in overrides() if key != "KEY"])
def test_overrides_are_settings(key: str) -> None:
    value = default()
    for name in key.split("."):
        assert isinstance(value, ConfigDict) and name in value, f"no setting {key}"
        value = value[name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`l2s_jax/nope.py`", ["names l2s_jax/nope.py, which does not exist"]),
        ("[a page](docs/nope.md)", ["names docs/nope.md, which does not exist"]),
        ("`python -m l2s_jax.nope`", ["runs l2s_jax.nope, which does not exist"]),
        (
            "```bash\npython -m l2s_jax.main --nope=1 --mode=plan && launch/local.sh --runs=a\n```",
            ["gives l2s_jax.main --nope, which it does not take"],
        ),
        (
            "```bash\npython -m l2s_jax.convert --input=a \\\n  --verifi\n```",
            ["gives l2s_jax.convert --verifi, which it does not take"],
        ),
        (
            "```bash\npython launch/ray_serve.py --replicas=2 --slots=2 --nope\n```",
            ["gives launch/ray_serve.py --nope, which it does not take"],
        ),
        ("`--nope=1`", ["names --nope, which no command takes"]),
        ("`runs/a/report.md`, `l2s_jax/main.py`, `--mode=plan`, `pip install --nope`", []),
    ],
)
def test_what_is_not_there_is_found(text: str, expected: list[str]) -> None:
    check = runpy.run_path(str(ROOT / ".ci" / "readme.py"))
    assert check["problems_of"]("page", text, {"mode"}) == [f"page {line}" for line in expected]
