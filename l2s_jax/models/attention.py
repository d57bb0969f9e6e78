"""Attention, whose scores never fill the memory, however long the prompt.

Scores are [B, N, Q, K] in float32: 137 GB for one row of 32,768 positions and 32 heads. Where they
are many, `attend` makes them for a block of queries and keys at a time, from a bias that is made
for a block at a time too, with a softmax that goes on from block to block (Milakov and Gimelshein
2018, arXiv 1805.02867; Rabe and Staats 2021, arXiv 2112.05682). Memory then grows as the length.
The gradient makes each block's scores again.

On TPUs, causal attention over a long prompt is by JAX's kernel, splash attention, with a window
too. T5's bias by distance has no kernel there. Letters as in layers.py.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int32

from l2s_jax.cluster.placement import program_mesh
from l2s_jax.cluster.sharding import ROWS, batch_ways, sequence_parts
from l2s_jax.models import counting, products, sequence
from l2s_jax.models.biases import Bias, CausalBias, GivenBias
from l2s_jax.models.cache import KeyValue

log = logging.getLogger(__name__)

# Of more scores than this, those of a head are made in blocks of at most so many queries and keys.
SCORES, QUERIES, KEYS = 1 << 20, 256, 512

# The kernel takes so many queries and keys at a time: the first of these that divides the length.
_PIECES = (512, 256, 128)

Dropout = Callable[[jax.Array], jax.Array]


def at_once(queries: int, keys: int) -> bool:
    """Whether the scores of so many queries and keys are made at once, and their bias too."""
    return queries * keys <= SCORES or counting.is_on()


def whole_length(length: int, has_dropout: bool) -> int:
    """To how many positions a causal model's are filled up: what the mesh, and the kernel, take."""
    multiple = sequence_parts(program_mesh())
    if not has_dropout and not at_once(length, length):
        multiple *= _PIECES[-1]
    return -(-length // multiple) * multiple


def attend(
    query: Float[Array, "B N Q H"],
    key_value: KeyValue,
    bias: Bias,
    scale: float,
    dropout: Dropout | None = None,
) -> Float[Array, "B Q N*H"]:
    """Softmax attention of N query heads to G key heads, each of which N/G queries share.

    Args:
      query: in any dtype, which is the result's.
      key_value: [B, G, K, H], in the query's dtype.
      bias: of the scores, mask included: an array [#B, #N, #Q, #K], or what makes one.
      scale: of the scores.
      dropout: of the weights, with one mask for all queries; None: there is none.
    """
    queries, keys = query.shape[2], key_value.key.shape[2]
    if at_once(queries, keys):
        whole = bias if isinstance(bias, jax.Array) else bias.block(0, queries, 0, keys)
        scores = products.by_keys(query, key_value.key) * scale + whole
        weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        if dropout is not None:
            # Where `fsdp` splits the rows, the TPU's compiler (libtpu 0.0.42) ends the process for
            # want of stack if it may do this within the product with the values.
            weights = jax.lax.optimization_barrier(dropout(weights))
        return products.by_values(weights, key_value.value)
    blocks = functools.partial(_by_blocks, scale=scale)
    if dropout is not None or not _has_kernel(query, key_value, bias):
        _say(f"attention to {keys:,} keys: in blocks")
        kept = None
        if dropout is not None:
            kept = dropout(jnp.ones((*query.shape[:2], 1, keys), query.dtype))
        return blocks(query, key_value, bias, kept)
    _say(f"attention to {keys:,} keys: on a TPU by splash attention, elsewhere in blocks")

    assert isinstance(bias, CausalBias)
    window = bias.window  # A condition makes an array of its operand's; the kernel wants a number.

    def kernel(query: jax.Array, key_value: KeyValue, bias: CausalBias) -> jax.Array:
        return by_kernel(query, key_value, bias.replace(window=window), scale)

    def where_gapless(query: jax.Array, key_value: KeyValue, bias: CausalBias) -> jax.Array:
        return jax.lax.cond(bias.is_gapless(), kernel, blocks, query, key_value, bias)

    of_tpu = kernel if window is None else where_gapless
    return jax.lax.platform_dependent(query, key_value, bias, tpu=of_tpu, default=blocks)


@functools.cache
def _say(what: str) -> None:
    """Logs it, once for all layers."""
    log.info("%s", what)


class _Mixed(NamedTuple):
    """Values as far as they are mixed: their sum, that of their weights, and the largest score."""

    values: Float32[Array, "B N Q H"]
    total: Float32[Array, "B N Q"]
    top: Float32[Array, "B N Q"]


def _by_blocks(
    query: Float[Array, "B N Q H"],
    key_value: KeyValue,
    bias: Bias,
    kept: Float[Array, "B N 1 K"] | None = None,
    *,
    scale: float,
) -> Float[Array, "B Q N*H"]:
    """As `attend`, in blocks; `kept` is what each weight is multiplied by."""
    blocks = functools.partial(_each_block, scale=scale)
    if not isinstance(bias, jax.Array) and sequence.splits(query.shape[2]):
        return sequence.by_parts(blocks, query, key_value, bias, kept)
    return blocks(query, key_value, bias, kept, 0)


def _each_block(
    query: Float[Array, "B N Q H"],
    key_value: KeyValue,
    bias: Bias,
    kept: Float[Array, "B N 1 K"] | None,
    offset: int | Int32[Array, ""],
    scale: float,
) -> Float[Array, "B Q N*H"]:
    """One block of queries and keys after the other; the first query has position `offset`."""
    rows, heads, queries, width = query.shape
    groups, keys = key_value.key.shape[1:3]
    size, piece = _even(queries, QUERIES), _even(keys, KEYS)
    # Their gradients are added up over the blocks, which bfloat16 is too short for.
    held = jax.tree.map(lambda leaf: _pieces(leaf.astype(jnp.float32), piece, axis=2), key_value)
    if kept is not None:
        kept = _pieces(kept, piece, axis=3)
    made = GivenBias(bias, size, piece) if isinstance(bias, jax.Array) else bias
    firsts = jnp.arange(len(held.key)) * piece

    @jax.checkpoint
    def mix(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, own = block

        def add(so_far: _Mixed, part: Any) -> _Mixed:
            first, held, kept = part
            key, value = held.key.astype(own.dtype), held.value.astype(own.dtype)
            scores = products.by_keys(own, key) * scale + made.block(start, size, first, piece)
            real = first + jnp.arange(piece) < keys
            scores = jnp.where(real[None, None, None, :], scores, -jnp.inf)
            # No gradient goes through it: weights and their sum are divided by it alike.
            top = jax.lax.stop_gradient(jnp.maximum(so_far.top, scores.max(axis=-1)))
            less, weights = jnp.exp(so_far.top - top), jnp.exp(scores - top[..., None])
            total = so_far.total * less + weights.sum(axis=-1)
            weights = (
                weights.astype(own.dtype) if kept is None else weights.astype(own.dtype) * kept
            )
            grouped = weights.reshape(rows, groups, -1, size, piece)
            more = jnp.einsum(
                "bgrqk,bgkh->bgrqh", grouped, value, preferred_element_type=jnp.float32
            ).reshape(rows, heads, size, width)
            return _Mixed(so_far.values * less[..., None] + more, total, top)

        @jax.checkpoint
        def turn(so_far: _Mixed, part: Any) -> tuple[_Mixed, None]:
            seen = made.sees(start, size, part[0], piece)
            if seen is True:
                return add(so_far, part), None
            return jax.lax.cond(seen, add, lambda so_far, _: so_far, so_far, part), None

        nothing = jnp.zeros((rows, heads, size), jnp.float32)
        begun = _Mixed(jnp.zeros((*nothing.shape, width)), nothing, nothing - jnp.inf)
        mixed, _ = jax.lax.scan(turn, begun, (firsts, held, kept))
        return (mixed.values / mixed.total[..., None]).astype(own.dtype)

    own = _pieces(query, size, axis=2)
    mixed = jax.lax.map(mix, (offset + jnp.arange(len(own)) * size, own))
    mixed = jnp.moveaxis(mixed, 0, 2).reshape(rows, heads, -1, width)[:, :, :queries]
    return mixed.transpose(0, 2, 1, 3).reshape(rows, queries, -1)


def _even(length: int, most: int) -> int:
    """The size of the blocks of at most so many that a length is split into."""
    return -(-length // -(-length // most))


def _pieces(x: jax.Array, size: int, axis: int) -> jax.Array:
    """x in blocks of that size along an axis, which are a first axis; the last may be padded."""
    room = [(0, 0)] * x.ndim
    room[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, room)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _has_kernel(query: jax.Array, key_value: KeyValue, bias: Bias) -> bool:
    """Whether `by_kernel` can do it, where a bias with a window is gapless."""
    if not isinstance(bias, CausalBias) or not isinstance(bias.window, int | None):
        return False
    rows, heads, length, _ = query.shape
    mesh = program_mesh()
    if length % (_PIECES[-1] * sequence_parts(mesh)):
        return False
    if mesh is None:
        return True
    tensor = mesh.shape["tensor"]
    return not (rows % batch_ways(mesh) or heads % tensor or key_value.key.shape[1] % tensor)


def by_kernel(
    query: Float[Array, "B N T H"],
    key_value: KeyValue,
    bias: CausalBias,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N*H"]:
    """As `attend`, by the kernel for TPUs; `interpret`: elsewhere, slowly, for tests.

    A window is one of slots here: with a window, the bias has to be gapless. What padding sees is
    other padding, so its results are others than those of `attend`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, heads, length, width = query.shape
    mesh = program_mesh()
    ways = mesh.shape["sequence"] if mesh else 1
    piece = next(size for size in _PIECES if length // sequence_parts(mesh) % size == 0)
    sizes = splash.BlockSizes(
        block_q=piece,
        block_kv=piece,
        block_q_dkv=piece,
        block_kv_dkv=piece,
        block_q_dq=piece,
        block_kv_dq=piece,
    )
    assert isinstance(bias.window, int | None)
    before = None if bias.window is None else bias.window - 1
    visible = masks.LocalMask((length, length), (before, 0), offset=0)
    if ways > 1:
        visible.q_sequence = sequence.attended(length, ways)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([visible] * heads),
        block_sizes=sizes,
        head_shards=mesh.shape["tensor"] if mesh else 1,
        q_seq_shards=ways,
        interpret=interpret,
    )

    def run(
        kernel: Any,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        own: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        if ways > 1:
            query = jnp.concatenate(sequence.exchanged(query, ways, axis=2), axis=2)
            own = jnp.concatenate(sequence.exchanged(own, ways, axis=1), axis=1)
        ids = splash.SegmentIds(own, mask)
        mixed = jax.vmap(kernel)(query * jnp.asarray(scale, query.dtype), key, value, ids)
        if ways > 1:
            mixed = sequence.returned(jnp.split(mixed, 2, axis=2), ways, axis=2)
        return mixed

    if mesh is not None:
        places = kernel.manual_sharding_spec(NamedSharding(mesh, P("tensor", "sequence")))
        split, whole = P(ROWS, "tensor", "sequence"), P(ROWS, "tensor")
        run = jax.shard_map(
            run,
            in_specs=(places, split, whole, whole, P(ROWS, "sequence"), P(ROWS)),
            out_specs=split,
            check_vma=False,
        )
    real = jnp.asarray(bias.mask).astype(jnp.int32)
    mixed = run(kernel, query, key_value.key, key_value.value, real, real)
    return mixed.transpose(0, 2, 1, 3).reshape(rows, length, heads * width)
