"""What answers prompts in an evaluation: the models of an experiment, text in and text out."""

from __future__ import annotations

from typing import Any

from l2s_jax.checkpoints.sharing import encoder_part
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.training import TrainedStage
from l2s_jax.models.exact import Exact
from l2s_jax.models.systems import Params, System
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.loading import make_generator
from l2s_jax.settings.search import Search, alone


def load(experiment: Experiment, stage: TrainedStage) -> tuple[System, Params, Params]:
    """(system, trained, frozen) of a stage, to generate with; read anew by every call."""
    context = experiment.context
    return stage.load(context.decoding_mesh, context.config.decoding.weights)


def generator_of(
    experiment: Experiment,
    stage: TrainedStage,
    model: tuple[System, Params, Params] | None = None,
) -> Generator:
    """That of a stage, whose model is read unless it is here already, as `load` gives it."""
    config = experiment.context.config
    return make_generator(
        config,
        model or load(experiment, stage),
        stage.prompts.tokenizer,
        stage.responses.tokenizer,
        mesh=experiment.context.decoding_mesh,
        search=alone(config.decoding.search.to_dict()),
    )


def exact_generator(experiment: Experiment) -> Generator:
    """As `generator_of`, of L2S and the LLM in exact decoding."""
    llm, parameters, _ = load(experiment, experiment.llm)
    # What encodes is a part of the LLM.
    l2s, trained = experiment.l2s.load_without_llm()
    return _exact(experiment, l2s, llm, trained, parameters["llm"])


def _exact(
    experiment: Experiment, l2s: Any, llm: Any, trained: Params, frozen: Params, **settings: Any
) -> Generator:
    tokenizer, context = experiment.llm.responses.tokenizer, experiment.context
    model = Exact(l2s, llm), trained, frozen
    return make_generator(
        context.config, model, tokenizer, tokenizer, mesh=context.decoding_mesh, **settings
    )


def side_by_side(experiment: Experiment, exact: Search | None = None) -> dict[str, Generator]:
    """Generators of all that answers, by system; `exact` is the search of exact decoding.

    What several of them read is in memory once: a large LLM is most of all there is.
    """
    generators = {}
    if experiment.llm.answers:
        generators["llm"] = generator_of(experiment, experiment.llm)
    generators["slm"] = generator_of(experiment, experiment.slm)
    model = None
    if _encodes_as_llm(experiment):
        system, trained = experiment.l2s.load_without_llm()
        held = generators["llm"].trained["llm"]
        model = system, trained, encoder_part(system.llm_config, held)
    l2s = generators["l2s"] = generator_of(experiment, experiment.l2s, model)
    if exact:
        llm = generators["llm"]
        generators["exact"] = _exact(
            *(experiment, l2s.system, llm.system, l2s.trained, llm.trained["llm"]),
            search=exact,
            served=True,
        )
    return generators


def _encodes_as_llm(experiment: Experiment) -> bool:
    """Whether what encodes for L2S is a part of the LLM that answers, as it is held."""
    context = experiment.context
    if not experiment.llm.answers or context.config.llm.tune.rank:
        return False
    dtype, encoder_dtype = context.dtypes
    return dtype == encoder_dtype and experiment.l2s.reads_llm == experiment.llm.content
