"""What no run could use of a config, a plan refuses in one line, before it compiles anything."""

from __future__ import annotations

import jax
import pytest

from tests import tiny
from tests.test_plan import devices

__all__ = ["devices"]  # a fixture that every test here has

TENSOR = ("mesh.data=1", "mesh.tensor=8")


def on_mesh(section: str, *axes: str) -> list[str]:
    return [f"{section}.{axis}" for axis in axes]


@pytest.mark.parametrize("programs", ["train", "encode", "run"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["slm.train.batch_size=12"], "config.slm.train.batch_size=12: mesh data=8"),
        (["labels.source=llm", "labels.batch_size=9"], "config.labels.batch_size=9: mesh data=8"),
        (
            ["distillation.weight=0.5", "distillation.batch_size=9"],
            "config.distillation.batch_size=9: mesh data=8",
        ),
        (
            ["labels.source=llm", *on_mesh("labels", *TENSOR), "llm.model.feed_forward_width=36"],
            "config.labels.mesh: mesh data=1, fsdp=1, tensor=8: encoder/layers_0",
        ),
        (
            ["distillation.weight=0.5", *on_mesh("labels", *TENSOR),
             "llm.model.feed_forward_width=36"],
            "config.labels.mesh: mesh data=1, fsdp=1, tensor=8: encoder/layers_0",
        ),
        (
            ["features.cache=x", *on_mesh("features", *TENSOR), "llm.model.feed_forward_width=36"],
            "config.features.mesh: mesh data=1, fsdp=1, tensor=8: encoder/layers_0",
        ),
        (
            [*on_mesh("decoding", *TENSOR), "slm.model.feed_forward_width=36"],
            "config.decoding.mesh: mesh data=1, fsdp=1, tensor=8: slm/",
        ),
        ([*TENSOR, "slm.model.feed_forward_width=36"], "mesh data=1, fsdp=1, tensor=8: slm/"),
        (
            ["mesh.data=1", "mesh.sequence=8", "buckets=((24,24),(32,32))"],
            "config.buckets: prompts of 24 tokens, which mesh data=1, fsdp=1, sequence=8",
        ),
        (
            ["decoding.mesh.data=1", "decoding.mesh.sequence=8", "buckets=((24,24),(32,32))"],
            "config.decoding.mesh: config.buckets: prompts of 24 tokens, which mesh data=1",
        ),
    ],
)  # fmt: skip
def test_what_meshes_do_not_divide(programs, settings, message, tmp_path, monkeypatch, capsys):
    def never(*arguments):
        raise AssertionError("compiled before all was checked")

    monkeypatch.setattr(jax.stages.Lowered, "compile", never)
    config = tiny.write_task(tmp_path / "task")
    flags = [f"--config.{setting}" for setting in settings]
    command = ["--mode=plan", f"--config={config}", f"--workdir={tmp_path / 'plan'}"]
    command += ["--topology=cpu:8", f"--programs={programs}"]
    assert tiny.run(*command, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
