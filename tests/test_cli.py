"""The console command, and what the package says of itself."""

from __future__ import annotations

import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import small
import tiny
import yaml

from l2s_jax import __version__, cli, convert, flags
from l2s_jax.bench import __main__ as bench
from l2s_jax.checkpoints.pretrained import save_hf
from l2s_jax.serve.flags import make_parser
from l2s_jax.settings.declare import flat, read
from l2s_jax.settings.sections import Settings

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


@pytest.fixture
def home(tmp_path, monkeypatch) -> pathlib.Path:
    """A home folder of its own, and another one to start commands in."""
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_a_run_finds_what_lies_at_home(home, capsys):
    tiny.write_task(home / "data")
    command = ("--config=~/data/tiny.py", "--workdir=~/run", "--config.task.data_dir=~/data")
    assert tiny.run(*command, "--config.llm.train.steps=1", "--until=llm") == 0
    assert (home / "run/llm/model/config.json").is_file()
    more = ("--config.llm.path=~/run/llm/model", "--config.features.cache=~/features")
    settings = (*more, "--config.tokenizer.train_vocab_size=0", "--config.llm.train.steps=0")
    assert tiny.run(*command, *settings, "--mode=status") == 0
    assert f"kept by prompt in {home}/features" in capsys.readouterr().out
    flags_of = ("--input=~/in.txt", "--output=~/out.txt", "--stop=~", "--compilation_cache=~/jax")
    (home / "in.txt").write_text("one two\n")
    assert tiny.run("--workdir=~/run", "--mode=generate", "--system=llm", *flags_of) == 0
    assert len((home / "out.txt").read_text().splitlines()) == 1
    assert flags.STOP.value == ["~"]  # a text
    assert flags.COMPILATION_CACHE.value == f"{home}/jax"
    assert list((home / "../elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "key", ["llm.path", "slm.path", "task.data_dir", "features.cache", "evaluation.comet"]
)
def test_a_path_of_a_config_may_begin_at_home(home, key):
    def value(text: str) -> str:
        *sections, name = key.split(".")
        values = {name: text}
        for section in reversed(sections):
            values = {section: values}
        return flat(read(Settings, values, "config"))[key]

    assert value("~/x") == f"{home}/x"
    for other in ("", "x/~", "gs://bucket/~", "org/name@main"):
        assert value(other) == other


def test_a_path_of_a_flag_may_begin_at_home(home):
    parse = bench._parser().parse_args
    asked = parse(["--llm=~/llm", "--output=~/bench.json", "--new_tokens=8"])
    assert (asked.llm, asked.output) == (f"{home}/llm", f"{home}/bench.json")
    asked = make_parser("serve", "").parse_args(["--model=~/m", "--compilation_cache=~/jax"])
    assert (asked.model, asked.compilation_cache) == (f"{home}/m", f"{home}/jax")


def test_a_model_is_converted_and_saved_at_home(home, monkeypatch):
    config = small.t5_config()
    save_hf(config, small.t5_params(config), "~/t5")
    assert (home / "t5/config.json").is_file()
    monkeypatch.setattr("sys.argv", ["convert", "--input=~/t5", "--output=~/out"])
    assert convert.main() == 0
    assert (home / "out/config.json").is_file()
    assert list((home / "../elsewhere").iterdir()) == []


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
