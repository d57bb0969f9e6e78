"""GGUF files as checkpoints: Hugging Face's names and config.json's fields, numbers dequantized.

A tensor is turned into float32 by the `gguf` package as it is read, and only the rows that are
needed, so that all behind it is as for a folder. Llama-, Qwen2- and Qwen3-class models.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from l2s_jax.checkpoints.files import Index, listed
from l2s_jax.gguf_file import Header, TensorInfo, read_header

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# name -> (number in a file, numbers in a block, bytes of a block)
TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "BF16": (30, 1, 2),
}
_NAMES = {number: name for name, (number, _, _) in TYPES.items()}

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Factors of the rotary frequencies, which become part of the config.
_FREQUENCIES = "rope_freqs.weight"
# Meta's, of Llama 3.1 to 3.3; llama.cpp's converter takes them where a config.json says "llama3".
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; its own where it has none."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    if (found := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) and found[2] in _LAYER:
        return f"model.layers.{found[1]}.{_LAYER[found[2]]}.{kind}"
    return name


class GgufTensors:
    """The tensors of a GGUF file, in the manner of `TensorFiles`, and its config.

    Attributes:
      source: the file.
      keys: Hugging Face's names of its tensors.
      fields: what a config.json would say.
    """

    def __init__(self, path: str) -> None:
        """Reads the head.

        Raises:
          ValueError: the file is cut short, or is of an architecture or a kind that is not read.
        """
        header = read_header(path)
        architecture = header.string("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{path}: general.architecture is {architecture!r}, which is not read; expected "
                f"one of {', '.join(ARCHITECTURES)}"
            )
        self.source = path
        self._infos = {_hf_name(name): info for name, info in header.tensors.items()}
        self._check(header)
        self._dequantize = _dequantizer(path)
        frequencies = self._infos.pop(_FREQUENCIES, None)
        self.keys = frozenset(self._infos)
        factors = None if frequencies is None else self._rows(frequencies, 0, 1)[0]
        self.fields = _fields(header, self._infos, factors)
        # llama.cpp turns a pair of a Llama's rotary dimensions, half a head apart, into neighbours.
        self._heads = {}
        if architecture == "llama":
            heads = [self.fields[f"num_{name}_heads"] for name in ("attention", "key_value")]
            self._heads = dict(zip((".q_proj.", ".k_proj."), heads, strict=True))

    def __enter__(self) -> GgufTensors:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def file(self, key: str) -> str:
        """Path of the file that holds `key`."""
        return self.source

    def holds(self, key: str) -> bool:
        """Whether a tensor is there."""
        return key in self.keys

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._infos[key].shape

    def dtype(self, key: str) -> str:
        """Type of a tensor as GGUF names it (F32, Q4_K, ...)."""
        return _NAMES[self._infos[key].kind]

    def read(self, key: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or the part of it at `index`, as float32."""
        info = self._infos[key]
        if len(info.shape) < 2:
            whole = self._rows(info, 0, 1).reshape(info.shape)
            unturned = whole if (width := self._turned(key)) is None else _unturn(whole, width)
            return unturned[index] if index else unturned
        first, *others = index or (slice(None),)
        start, stop, _ = first.indices(info.shape[0])
        width = self._turned(key)
        if width is None:
            part = self._rows(info, start, stop)
        else:
            # Rows change places within a head, so whole heads are read.
            low, high = start // width * width, -(-stop // width) * width
            part = _unturn(self._rows(info, low, high), width)[start - low : stop - low]
        return part[(slice(None), *others)]

    def _turned(self, key: str) -> int | None:
        """The width of the heads whose rows are to be put in order, or None."""
        for part, heads in self._heads.items():
            if part in key:
                return self._infos[key].shape[0] // heads
        return None

    def _rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor; one of a single axis is a row."""
        columns = math.prod(info.shape[1:] if len(info.shape) > 1 else info.shape)
        size = _bytes_of(info.kind, columns)
        try:
            with open(self.source, "rb") as file:
                file.seek(info.offset + start * size)
                raw = np.fromfile(file, np.uint8, (stop - start) * size)
        except OSError as error:
            raise ValueError(f"{self.source}: cannot be read: {error.strerror}") from None
        if len(raw) < (stop - start) * size:
            raise ValueError(f"{self.source}: {info.name} is cut short")
        shape = (stop - start, *info.shape[1:]) if len(info.shape) > 1 else (1, columns)
        return self._dequantize(raw.reshape(stop - start, size), info.kind).reshape(shape)

    def _check(self, header: Header) -> None:
        """Whether all tensors are of a known type, and lie in the file as wholes."""
        unknown = sorted(
            f"{t.name} of type {_type_name(t.kind)}"
            for t in header.tensors.values()
            if t.kind not in _NAMES
        )
        if unknown:
            raise ValueError(
                f"{self.source}: a kind of quantization that is not read: {listed(unknown, 3)}; "
                f"expected {', '.join(TYPES)}"
            )
        for info in header.tensors.values():
            row = info.shape[-1] if info.shape else 1
            block = TYPES[_NAMES[info.kind]][1]
            if row % block:
                raise ValueError(f"{self.source}: {info.name}: rows of {row}, in blocks of {block}")
            end = info.offset + _bytes_of(info.kind, math.prod(info.shape))
            if end > header.file_size:
                raise ValueError(
                    f"{self.source}: cut short: {info.name} ends at byte {end:,}, the file at "
                    f"{header.file_size:,}"
                )


def _bytes_of(kind: int, numbers: int) -> int:
    _, block, size = TYPES[_NAMES[kind]]
    return numbers // block * size


def _package(path: str) -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError(
            f"{path}: a GGUF file needs the gguf package: pip install 'l2s-jax[gguf]'"
        ) from None
    return gguf


def _type_name(kind: int) -> str:
    """A type's name, where the package knows one."""
    try:
        import gguf

        return gguf.GGMLQuantizationType(kind).name
    except (ImportError, ValueError):
        return str(kind)


def _dequantizer(path: str) -> Any:
    """(bytes [R, bytes of a row], type) -> float32 [R, numbers of a row]."""
    package = _package(path)

    def dequantize(raw: np.ndarray, kind: int) -> np.ndarray:
        return package.quants.dequantize(raw, package.GGMLQuantizationType(kind))

    return dequantize


def _unturn(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows of whole heads of `width`, neighbours -> half a head apart."""
    pairs = rows.reshape(-1, width // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _fields(
    header: Header, infos: dict[str, TensorInfo], factors: np.ndarray | None
) -> dict[str, Any]:
    """What a config.json of the model would say; `factors` of the rotary frequencies, if any."""
    kind = header.string("general.architecture")

    def whole(name: str) -> int | None:
        return header.integer(f"{kind}.{name}")

    if whole("expert_count"):
        raise ValueError(f"{header.path}: a mixture of experts, which is not read")
    embedding = infos.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{header.path}: no token_embd.weight of two axes")
    for name in ("embedding_length", "feed_forward_length", "block_count", "attention.head_count"):
        if not whole(name):
            raise ValueError(
                f"{header.path}: {kind}.{name} is {whole(name)}, expected a number >= 1"
            )
    width, heads = whole("embedding_length"), whole("attention.head_count")
    head_width = whole("attention.key_length")
    if head_width is None and width and heads:
        head_width = width // heads
    if (values := whole("attention.value_length")) not in (None, head_width):
        raise ValueError(
            f"{header.path}: values of width {values} beside keys of {head_width}: not read"
        )
    rotated = whole("rope.dimension_count")
    epsilon = header.number(f"{kind}.attention.layer_norm_rms_epsilon", 1e-6)
    fields = {
        "model_type": kind,
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv") or heads,
        "head_dim": head_width,
        "max_position_embeddings": whole("context_length"),
        "rms_norm_eps": _shortest(epsilon),
        "rope_theta": header.number(f"{kind}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in infos,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in infos,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in infos,
        "eos_token_id": header.integer("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.integer("tokenizer.ggml.padding_token_id"),
        "bos_token_id": header.integer("tokenizer.ggml.bos_token_id"),
    }
    if rotated is not None and head_width and rotated != head_width:
        fields["partial_rotary_factor"] = rotated / head_width
    if scaling := _scaling(header, kind, fields, factors):
        fields["rope_scaling"] = scaling
    return {name: value for name, value in fields.items() if value is not None}


def _shortest(value: float | None) -> float:
    """The number that was written as this float32: 1e-05 rather than 9.99999974e-06."""
    return float(str(np.float32(value)))


def _scaling(
    header: Header, kind: str, fields: dict[str, Any], factors: np.ndarray | None
) -> dict[str, Any] | None:
    """The rope_scaling of a config.json."""
    prefix = f"{kind}.rope.scaling"
    named = header.string(f"{prefix}.type", "none")
    factor = header.number(f"{prefix}.factor") or header.number(f"{kind}.rope.scale_linear")
    if factors is not None:
        scaling = {**_LLAMA3, "factor": float(factors.max())}
        if named != "none" or not np.allclose(factors, _llama3_factors(fields, scaling), rtol=1e-4):
            raise ValueError(
                f"{header.path}: {_FREQUENCIES} is not as Llama 3's, which is not read"
            )
        return scaling
    if named == "none" and factor in (None, 1.0):
        return None
    if named in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor}
    if named != "yarn":
        raise ValueError(f"{header.path}: {prefix}.type is {named!r}, which is not read")
    for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        # llama.cpp takes -1 for what the type of scaling says.
        if (value := header.number(f"{prefix}.{name}")) not in (None, 1.0, -1.0):
            raise ValueError(f"{header.path}: {prefix}.{name} is {value:g}, which is not read")
    scaling = {"rope_type": "yarn", "factor": factor}
    names = {
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    for theirs, ours in names.items():
        if (value := header.number(f"{prefix}.{theirs}")) is not None:
            scaling[ours] = value
    return scaling


def _llama3_factors(fields: dict[str, Any], scaling: dict[str, Any]) -> np.ndarray:
    """By how much Llama 3 divides each rotary frequency."""
    width = fields["head_dim"]
    frequencies = fields["rope_theta"] ** -(np.arange(0, width, 2) / width)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / scaling["factor"] + share)
