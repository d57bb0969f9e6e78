"""The console command, and what the package says of itself."""

from __future__ import annotations

import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from l2s_jax import __version__, cli

ROOT = pathlib.Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def test_help_names_every_command_and_imports_none() -> None:
    code = (
        "import sys; from l2s_jax import cli; sys.argv = ['l2s-jax', '--help']; cli.main(); "
        "print([name for name in ('jax', 'absl', 'numpy') if name in sys.modules])"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    *lines, imported = result.stdout.splitlines()
    assert imported == "[]"
    for name, (module, _) in cli.COMMANDS.items():
        assert any(line.split()[:1] == [name] and module in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "--config=configs/quickstart.py", "--config.l2s.fusion=nope"), "fusion"),
        (("convert", "--input=nope", "--inspect"), "nope"),
        (("bench", "--threads=nope"), "--threads"),
        (("serve", "--model=nope", "--slots=0"), "--slots"),
    ],
)
def test_is_the_command_of_the_module(
    arguments: tuple[str, ...], expected: str, tmp_path: pathlib.Path
) -> None:
    workdir = (f"--workdir={tmp_path}",) if arguments[0] == "run" else ()
    result = run("-m", "l2s_jax.cli", *arguments, *workdir)
    assert result.returncode == 2
    assert expected in result.stderr.splitlines()[-1]


def test_a_config_imports_its_neighbour(tmp_path: pathlib.Path) -> None:
    config = "configs/wmt14_en_fr.py"
    assert "from configs import" in (ROOT / config).read_text()
    console = str(pathlib.Path(sys.executable).parent / "l2s-jax")
    flags = (f"--config={config}", f"--workdir={tmp_path}", "--config.l2s.fusion=nope")
    result = subprocess.run([console, "run", *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "fusion" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"), [((), "run, convert, serve, bench"), (("train",), "'train'")]
)
def test_no_such_command_is_one_line(arguments: tuple[str, ...], expected: str) -> None:
    result = run("-m", "l2s_jax.cli", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and expected in line


def test_pre_commit_has_the_ruff_of_the_constraints() -> None:
    (version,) = re.findall(r"^ruff==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["additional_dependencies"] for hook in repository["hooks"]] == [[version]] * 2


def test_metadata_name_what_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for entry in project["scripts"].values():
        module, function = entry.split(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert (ROOT / "l2s_jax" / "py.typed").exists()
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    assert cited["references"][0]["url"] == project["urls"]["Paper"]


def test_a_module_is_read_in_one_sitting() -> None:
    modules = (ROOT / "l2s_jax").rglob("*.py")
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    assert len(lines) > 100
    assert {name: count for name, count in lines.items() if count > 350} == {}
