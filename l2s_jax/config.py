"""The config as users know it: an ml_collections ConfigDict. Files in configs/ start here.

What there is to set, with its default, range and meaning, is in settings/sections.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import os
import re
import traceback
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import ml_collections
import ml_dtypes  # noqa: F401  numpy knows bfloat16 by it
import numpy as np
from ml_collections import ConfigDict

from l2s_jax.settings import rules
from l2s_jax.settings.cut import Cut
from l2s_jax.settings.declare import Section, nearest, read
from l2s_jax.settings.describe import describe
from l2s_jax.settings.geometry import Model
from l2s_jax.settings.moved import MOVED
from l2s_jax.settings.sections import DTYPE, Settings
from l2s_jax.settings.training import TUNED

if TYPE_CHECKING:
    from jax.sharding import Mesh


def default() -> ConfigDict:
    """A whole experiment."""
    return of_settings(Settings())


def model_config(family: str = "t5") -> ConfigDict:
    """Geometry of a model that is made here; the names are those of its family's config class."""
    return _locked(read(Model, {"family": family}, "model"))


def _locked(section: Section) -> ConfigDict:
    return ConfigDict(dataclasses.asdict(section)).lock()


def of_settings(settings: Settings) -> ConfigDict:
    """Settings as a ConfigDict, which takes no other keys but a task's splits and fields."""
    config = _locked(settings)
    config.task.splits.unlock()
    config.task.truncate.unlock()
    config.task.chat.options.unlock()
    return config


def typed(config: ConfigDict) -> Settings:
    """The settings of a config.

    Raises:
      ValueError: one line that names the key, its value and what was expected.
    """
    return read(Settings, config.to_dict(), "config")


def settled(config: ConfigDict, given: Collection[str] = ()) -> ConfigDict:
    """A config that a user has written; see `settings.rules.settle`.

    Args:
      config: of a file, with what the command line changed.
      given: keys that it changed.

    Raises:
      ValueError: a value that does not fit, or one that has no effect and is not the default.
    """
    return of_settings(rules.settle(config.to_dict(), given))


def buckets_of(config: ConfigDict) -> tuple[tuple[int, int], ...]:
    """(prompt, response) lengths that batches are padded to, ascending.

    None is above max_prompt_tokens and max_response_tokens, at which texts are cut; the last one is
    these two.
    """
    most = (config.max_prompt_tokens, config.max_response_tokens)
    clipped = (tuple(map(min, bucket, most)) for bucket in config.buckets)
    return tuple(dict.fromkeys(clipped))


def check_prompts(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a ValueError if the mesh cannot split prompts of a length of `buckets_of`."""
    # Imported here, so that configs don't wait for it.
    from l2s_jax.cluster import sharding

    given = {prompt for prompt, _ in config.buckets}
    for length, _ in buckets_of(config):
        setting = "buckets" if length in given else "max_prompt_tokens"
        sharding.check_lengths([length], mesh, f"config.{setting}")


def label_tokens(config: ConfigDict) -> int:
    """Where the LLM's responses to the train split are cut."""
    return config.labels.max_new_tokens or config.max_response_tokens


def cut_of(slm: ConfigDict) -> Cut:
    """What config.slm is cut out of a model."""
    return Cut(**slm.cut.to_dict())


def training_seed(config: ConfigDict) -> int:
    """Of what is random in the training of the SLM alone and of L2S."""
    return config.seed if config.train_seed < 0 else config.train_seed


def tuned_l2s(config: ConfigDict) -> ConfigDict:
    """`config.l2s` of the training that goes on with a change of the LLM, `config.llm.tune`.

    The change is trained whatever else is; a warm-up takes half of the steps at most.
    """
    section, tune = ConfigDict(config.l2s.to_dict()), config.llm.tune
    train = section.train
    train.update(steps=tune.steps, learning_rate=tune.learning_rate)
    train.warmup_steps = min(train.warmup_steps, tune.steps // 2)
    if train.trainable:
        train.trainable = (*train.trainable, f"{TUNED}/.*")
    return section


def mesh_sizes(config: ConfigDict, section: str = "") -> dict[str, int]:
    """What `config.mesh` says, or of a section with a mesh of its own what that changes."""
    own = config[section].mesh.to_dict() if section else {}
    return {**config.mesh.to_dict(), **{axis: size for axis, size in own.items() if size}}


def make_mesh(config: ConfigDict, section: str = "") -> Mesh:
    """The mesh of training, or of a section with one of its own, over all devices.

    Raises:
      ValueError: the sizes do not fit the devices.
    """
    # Imported here, so that configs don't wait for it.
    from l2s_jax.cluster import sharding

    with naming_mesh(config, section):
        return sharding.make_mesh(mesh_sizes(config, section))


@contextlib.contextmanager
def naming_mesh(config: ConfigDict, section: str) -> Iterator[None]:
    """Has a ValueError about a section's mesh say where it is set, if it isn't `config.mesh`."""
    try:
        yield
    except ValueError as error:
        if mesh_sizes(config, section) == mesh_sizes(config):
            raise
        raise ValueError(f"config.{section}.mesh: {error}") from None


def compute_dtype(name: str, platform: str | None = None) -> np.dtype:
    """The dtype that `config.dtype` names, on a platform's devices or else this machine's."""
    DTYPE.checked("config.dtype", name)
    if name == "auto":
        if platform is None:
            # Imported here, so that configs don't wait for it.
            import jax

            platform = jax.default_backend()
        name = "float32" if platform == "cpu" else "bfloat16"
    return np.dtype(name)


def compute_dtypes(
    dtype: str, encoder_dtype: str = "auto", platform: str | None = None
) -> tuple[np.dtype, np.dtype]:
    """The dtypes that `config.dtype` and `config.llm.encoder_dtype` name, in this order.

    Raises:
      ValueError: one of them is no dtype for products.
    """
    common = compute_dtype(dtype, platform)
    DTYPE.checked("config.llm.encoder_dtype", encoder_dtype)
    return common, common if encoder_dtype == "auto" else np.dtype(encoder_dtype)


def unknown_key(flags: Collection[str]) -> str:
    """What is wrong with the first of the flags --config.KEY=VALUE that no config has; or ""."""
    for flag in flags:
        if wrong := wrong_key(flag.partition("=")[0].removeprefix("--config.")):
            return f"{flag}: {wrong}"
    return ""


def wrong_key(key: str) -> str:
    """What is wrong with a key, and the nearest that there is; "" if there is such a key."""
    known = [key.key for key in describe()]
    parts = key.split(".")
    if parts[:2] == ["task", "splits"]:
        return ""
    for i, part in enumerate(parts):
        before = "".join(f"{one}." for one in parts[:i])
        names = {k[len(before) :].partition(".")[0] for k in known if k.startswith(before)}
        if part not in names:
            return f"no such setting, {part!r}{nearest(part, sorted(names))}"
    return ""


def complaint(error: BaseException) -> str | None:
    """FILE:LINE: CODE: what is wrong there, of an error that a config file caused; else None."""
    # What the flags' parser makes of an error no longer has the line, but its context does.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SyntaxError):
            return f"{cause.filename}:{cause.lineno}: {(cause.text or '').strip()}: {cause.msg}"
        frames = traceback.extract_tb(cause.__traceback__)
        starts = [i for i, frame in enumerate(frames) if frame.name in ("get_config", "<module>")]
        libraries = (*ml_collections.__path__, os.path.dirname(__file__))
        for frame in reversed(frames[min(starts, default=len(frames)) :]):
            if not frame.filename.startswith(libraries):
                return f"{frame.filename}:{frame.lineno}: {_wrong(cause, frame)}"
        cause = cause.__context__
    return None


def _wrong(error: BaseException, frame: traceback.FrameSummary) -> str:
    """The code at a frame, and what an error of ml_collections says of it, in few words."""
    lines = range(frame.lineno or 0, (frame.end_lineno or 0) + 1)
    code = " ".join(linecache.getline(frame.filename, line).strip() for line in lines)
    for old, new in MOVED.items():
        if re.search(rf"\b{re.escape(old)}\b(?!\.)", code):
            return f"{code}: config.{old} is now config.{new}"
    said: Any = error
    while isinstance(said, BaseException):
        said = said.args[0] if said.args else type(said).__name__
    first, *others = str(said).splitlines() or [""]
    if isinstance(error, AttributeError | KeyError) and (
        name := re.match(r"(?:Key \"(\w+)\" does not exist|'?(\w+)'?$)", first)
    ):
        unknown = name[1] or name[2]
        near = re.search(r'Did you mean "(\w+)"', " ".join(others))
        place = re.match(rf"config\.([\w.]*?)(?:{unknown}\b|update\(.*\b{unknown}=)", code)
        if not near and place and (wrong := wrong_key(f"{place[1]}{unknown}")):
            return f"{code}: {wrong}"
        hint = f", did you mean {near[1]!r}?" if near else ""
        return f"{code}: no such setting, {unknown!r}{hint}"
    if kinds := re.search(r"(\S+) is of original type .* casted to type <class '([\w.]+)'>", first):
        return f"{code}: expected {kinds[2].rpartition('.')[2]}"
    return f"{code}: {first}"
