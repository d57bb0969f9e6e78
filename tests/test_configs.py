"""Every file in configs/: known keys, usable settings, and models that fit at their full size."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import runpy
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from l2s_jax.checkpoints.pretrained import family_of
from l2s_jax.config import buckets_of, settled
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.models.cutting import cut_config
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoXConfig
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.systems import (
    LanguageModel,
    LlmToSlm,
    Params,
    System,
    parameter_count,
)
from l2s_jax.models.t5 import T5Config
from l2s_jax.settings.cut import Cut

ROOT = pathlib.Path(__file__).parent.parent
DEPTHS = ("num_layers", "num_encoder_layers", "num_decoder_layers")
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))

_T5_LARGE = T5Config(
    width=1024,
    num_heads=16,
    feed_forward_width=4096,
    num_encoder_layers=24,
    num_decoder_layers=24,
)
_QWEN3 = LlamaConfig(
    vocab_size=151_936,
    width=4096,
    num_kv_heads=8,
    feed_forward_width=12_288,
    num_layers=36,
    query_key_norm=True,
    pad_id=151_643,
    eos_id=151_645,
)
# directory that configs name -> (geometry, parameters, whose tokenizer). The counts are those of
# transformers, and, rounded, the published ones.
CHECKPOINTS = {
    "checkpoints/t5-small": (T5Config(), 60_506_624, "t5"),
    "checkpoints/t5-base": (
        T5Config(
            width=768,
            num_heads=12,
            feed_forward_width=3072,
            num_encoder_layers=12,
            num_decoder_layers=12,
        ),
        222_903_552,
        "t5",
    ),
    "checkpoints/t5-large": (_T5_LARGE, 737_668_096, "t5"),
    "checkpoints/flan-t5-xl": (
        dataclasses.replace(
            _T5_LARGE,
            width=2048,
            num_heads=32,
            feed_forward_width=5120,
            activation="gated_gelu",
            tied_head=False,
        ),
        2_849_757_184,
        "t5",
    ),
    "checkpoints/flan-t5-xxl": (
        dataclasses.replace(
            _T5_LARGE,
            width=4096,
            num_heads=64,
            feed_forward_width=10240,
            activation="gated_gelu",
            tied_head=False,
        ),
        11_135_332_352,
        "t5",
    ),
    "checkpoints/llama-3-70b-instruct": (
        LlamaConfig(
            vocab_size=128_256,
            width=8192,
            num_heads=64,
            num_kv_heads=8,
            feed_forward_width=28_672,
            num_layers=80,
        ),
        70_553_706_496,
        "llama3",
    ),
    "checkpoints/gpt2": (GPT2Config(), 124_439_808, "gpt2"),
    # One more row than GPT-2 for a padding token.
    "checkpoints/lamini-gpt-124m": (GPT2Config(vocab_size=50_258), 124_440_576, "lamini"),
    "checkpoints/pythia-160m": (GPTNeoXConfig(), 162_322_944, "pythia"),
    "checkpoints/smollm2": (
        LlamaConfig(
            vocab_size=49_152,
            width=576,
            num_heads=9,
            num_kv_heads=3,
            head_width=64,
            feed_forward_width=1536,
            num_layers=30,
            rotary=Rotary(64, 1e5),
            tied_head=True,
            pad_id=2,
        ),
        134_515_008,
        "smollm2",
    ),
    "checkpoints/qwen3-8b": (_QWEN3, 8_190_735_360, "qwen3"),
    "checkpoints/qwen3-0.6b": (
        dataclasses.replace(
            _QWEN3,
            width=1024,
            num_heads=16,
            feed_forward_width=3072,
            num_layers=28,
            tied_head=True,
        ),
        596_049_920,
        "qwen3",
    ),
}


@pytest.fixture(params=NAMES)
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ConfigDict:
    """As the flag --config loads it: a file, run from the repository's root."""
    monkeypatch.chdir(ROOT)
    return runpy.run_path(f"configs/{request.param}.py")["get_config"]()


def test_the_list_is_that_of_the_issue() -> None:
    assert set(NAMES) >= {
        "aeslc",
        "alpaca_gpt2",
        "alpaca_lamini",
        "alpaca_pythia",
        "alpaca_qwen3",
        "cnn_dailymail",
        "multi30k_en_de",
        "multi30k_en_fr",
        "quickstart",
        "wmt14_en_de",
        "wmt14_en_de_t5_base",
        "wmt14_en_fr",
        "wmt16_en_ro",
    }


@pytest.mark.parametrize("name", NAMES)
def test_plain_import_and_docstring_command(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    assert module.get_config().task.name in (
        name,
        "aeslc",
        "l2s_synthetic",
        "multi30k_en_de",
        "multi30k_en_fr",
        "wmt14_en_de",
    )
    command = module.__doc__.replace("$name", name)
    assert f"--config=configs/{name}.py --workdir=runs/{name}\n" in command


def test_each_call_makes_a_new_config(config: ConfigDict, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["config"]
    module = importlib.import_module(f"configs.{name}")
    module.get_config().task.splits["train"] = None
    assert module.get_config() == config


def test_known_keys_only(config: ConfigDict) -> None:
    assert config.is_locked
    assert set(config.task.splits) == {"train", "validation", "test"}


def test_every_setting_has_an_effect(config: ConfigDict) -> None:
    assert settled(config).to_dict() == config.to_dict()


def test_settings_are_usable(config: ConfigDict, tmp_path: pathlib.Path) -> None:
    Experiment(config, str(tmp_path))
    if not config.tokenizer.train_vocab_size:
        is_cut = Cut(**config.slm.cut.to_dict()).is_used
        assert config.slm.path or is_cut, (
            "a random SLM's vocabulary is that of the tokenizer trained here"
        )


# What may differ between the training of the SLM alone and that of L2S: why. Not their labels,
# which are one stage for both.
MAY_DIFFER = {"remat": "how a gradient is computed, not what it is"}


def test_the_slm_alone_and_l2s_are_trained_alike(config: ConfigDict) -> None:
    alone, l2s = config.slm.train.to_dict(), config.l2s.train.to_dict()
    differ = [name for name in alone if alone[name] != l2s[name] and name not in MAY_DIFFER]
    assert differ == []
    assert config.slm.lora == config.l2s.lora


def test_an_llm_that_makes_labels_has_learnt_to_answer(config: ConfigDict) -> None:
    if config.labels.source == "llm":
        # Trained on the task by the run or, as T5 and Flan-T5, before; or tuned for chats.
        is_t5 = "t5" in config.llm.path
        assert config.llm.train.steps or is_t5 or config.task.chat.user


def test_what_is_called_t5s_own_fine_tuning_is_that(config: ConfigDict) -> None:
    if (config.slm.train.optimizer, config.slm.train.schedule) != ("adafactor", "constant"):
        return
    for section in (config.slm, config.l2s):
        train = section.train
        assert (train.learning_rate, train.dropout_rate, train.clip_norm) == (1e-3, 0.1, 0)
        assert train.parameter_scale and not train.warmup_steps and not train.weight_decay


def test_buckets_ascend_and_hold_the_maxima(config: ConfigDict) -> None:
    prompts, responses = zip(*config.buckets, strict=True)
    assert list(prompts) == sorted(prompts)
    assert list(responses) == sorted(responses)
    assert len(set(config.buckets)) == len(config.buckets)
    assert config.buckets[-1] == (config.max_prompt_tokens, config.max_response_tokens)
    assert buckets_of(config) == config.buckets
    assert config.evaluation.latency.prompt_tokens <= config.max_prompt_tokens
    assert config.evaluation.latency.new_tokens <= config.decoding.max_new_tokens


def model_of(config: ConfigDict, name: str, tmp_path: pathlib.Path) -> tuple[ModelConfig, str]:
    """The config, and whose tokenizer, of the LLM or SLM that a run would train or load."""
    section = config[name]
    cut = Cut(**config.slm.cut.to_dict())
    if section.path or (name == "slm" and cut.is_used):
        geometry, _, tokenizer = CHECKPOINTS[section.path or config.llm.path]
        return cut_config(geometry, cut) if name == "slm" else geometry, tokenizer
    experiment = Experiment(config, str(tmp_path))
    own = name == "slm" and section.tokenizer.train_vocab_size
    size = own or config.tokenizer.train_vocab_size
    tokenizer = SimpleNamespace(vocab_size=size, pad_id=0, eos_id=1)
    experiment.llm_tokenizer.tokenizer = experiment.slm_tokenizer.tokenizer = tokenizer
    made, params = getattr(experiment, name).starting_point()
    assert params is None
    return made, "its own" if own else "trained here"


@functools.cache
def abstract_params(system: System) -> Params:
    return jax.eval_shape(system.init, jax.random.key(0))


def shallow(config: ModelConfig) -> ModelConfig:
    """With two layers in the place of many, which are all alike."""
    names = [field.name for field in dataclasses.fields(config)]
    depths = {name: min(getattr(config, name), 2) for name in names if name in DEPTHS}
    return dataclasses.replace(config, **depths)


def abstract_batch(config: ConfigDict, name: str, batch_size: int) -> dict[str, object]:
    prompt, response = config.buckets[-1]

    def side(prefix: str, tokens: int) -> dict[str, object]:
        shape = (batch_size, tokens)
        return {
            f"{prefix}_ids": jax.ShapeDtypeStruct(shape, jnp.int32),
            f"{prefix}_mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }

    return {**side(name, prompt), **side("response", response)}


def test_models_at_full_size(config: ConfigDict, tmp_path: pathlib.Path) -> None:
    (llm, of_llm), (slm, of_slm) = (model_of(config, name, tmp_path) for name in ("llm", "slm"))
    encoder, kept = family_of(llm).encoder_parameters(llm, config.llm.layer)
    # Tracing takes as long as a model is deep.
    systems = {
        "llm": LanguageModel("llm", shallow(llm)),
        "slm": LanguageModel("slm", shallow(slm)),
        "l2s": LlmToSlm(
            shallow(encoder),
            shallow(slm),
            config.l2s.projector_width or slm.width,
            fusion=config.l2s.fusion,
            shared_vocabulary=of_llm == of_slm,
        ),
    }
    trained = {name: abstract_params(system) for name, system in systems.items()}
    whole = trained["llm"]["llm"]
    encoding = {name: whole[name] for name in whole if f"{name}/".startswith(kept)}
    frozen = {"llm": {}, "slm": {}, "l2s": encoding}
    for name, system in systems.items():
        batch_size = config[name].train.batch_size
        batch = abstract_batch(config, system.prompt_name, batch_size)
        inputs = trained[name], frozen[name], batch
        logits = jax.eval_shape(lambda *x, s=system: s.scored(*x).logits(), *inputs)
        shape = (batch_size, config.buckets[-1][1], system.decoder.vocab_size)
        assert (logits.shape, logits.dtype) == (shape, jnp.float32)

        ids, mask = (batch[f"{system.prompt_name}_{part}"] for part in ("ids", "mask"))
        hidden = jax.eval_shape(system.encode, trained[name], frozen[name], ids, mask)

        def second_token(
            trained: Params,
            frozen: Params,
            ids: jax.Array,
            mask: jax.Array,
            hidden: jax.Array,
            system: System = system,
        ) -> jax.Array:
            tokens = config.decoding.max_new_tokens
            logits, cache = system.prefill(trained, frozen, ids, mask, hidden, tokens)
            return system.step(trained, jnp.argmax(logits, -1), cache)[0]

        step = jax.eval_shape(second_token, trained[name], frozen[name], ids, mask, hidden)
        assert step.shape == (batch_size, system.decoder.vocab_size)

    read = {
        name: system.parameters_read_per_token(trained[name]) for name, system in systems.items()
    }
    assert read["l2s"] == read["slm"]
    large, small = LanguageModel("llm", llm), LanguageModel("llm", slm)
    whole, part = abstract_params(large), abstract_params(small)
    assert parameter_count(part) < parameter_count(whole)
    assert small.parameters_read_per_token(part) < large.parameters_read_per_token(whole)


@pytest.mark.parametrize("path", CHECKPOINTS)
def test_checkpoint_sizes(path: str) -> None:
    geometry, parameters, _ = CHECKPOINTS[path]
    assert parameter_count(abstract_params(LanguageModel("llm", geometry))) == parameters
    wider = dataclasses.replace(geometry, feed_forward_width=geometry.feed_forward_width + 1)
    sizes = {
        parameter_count(abstract_params(LanguageModel("llm", shallow(of))))
        for of in (geometry, wider)
    }
    assert len(sizes) == 2
