"""No program of a plan is compiled twice, whoever asks for it."""

from __future__ import annotations

import jax

from l2s_jax.plan.command import plan
from l2s_jax.plan.program import Work
from l2s_jax.plan.programs import PROGRAMS, RUN
from tests.test_plan import devices, small_config

__all__ = ["devices"]  # a fixture that every test here has


def test_a_plan_with_all_that_it_can_do_compiles_each_program_once(tmp_path, monkeypatch):
    config = small_config(data=2)
    # Or the LLM's programs would be the SLM's too.
    config.slm.model.update(num_encoder_layers=2, num_decoder_layers=2)
    config.buckets = ((8, 8), (16, 16))
    config.evaluation.max_examples = 20
    compile_it, compiled = jax.stages.Lowered.compile, []

    def counted(lowered: jax.stages.Lowered, *arguments) -> jax.stages.Compiled:
        compiled.append(lowered.as_text())
        return compile_it(lowered, *arguments)

    monkeypatch.setattr(jax.stages.Lowered, "compile", counted)
    settings = {"programs": (*PROGRAMS, RUN), "compiled": str(tmp_path / "steps")}
    plan(config, str(tmp_path), "cpu:2", **settings)
    # A step of each training and bucket. Of each system that answers: what encodes, what prefills,
    # and a token's costs are what two tokens in a turn of the loop have more than one.
    assert len(compiled) == 3 * 2 + 3 * (1 + 1 + 2)
    # Once its prompt is encoded, L2S decodes by the SLM's programs, as another system.
    assert len(set(compiled)) == len(compiled) - (1 + 2)


def test_where_it_is_set_makes_no_other_work():
    first = Work(None, 8, 4, {"temperature": 0.5}, decoding_where="labels")
    assert first == Work(None, 8, 4, {"temperature": 0.5}, decoding_where="decoding")
    assert first != Work(None, 8, 5, {"temperature": 0.5}, decoding_where="labels")
