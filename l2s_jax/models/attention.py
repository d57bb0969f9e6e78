"""Attention, whose scores never fill the memory, however long the prompt.

Scores are [B, N, Q, K] in float32: 137 GB for one row of 32,768 positions and 32 heads. Where they
are many, `attend` makes them for a block of queries at a time, from a bias that is made for a block
at a time too. Memory then grows as the length. A query's scores are all there at once, so its
softmax is the plain one. The gradient makes each block's scores again.

On TPUs, causal attention over a long prompt is by JAX's kernel, splash attention, which makes no
scores in memory at all. Letters as in layers.py.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32

from l2s_jax.cluster.sharding import ROWS, AnyArray, batch_ways, program_mesh
from l2s_jax.models import products
from l2s_jax.models.cache import KeyValue

log = logging.getLogger(__name__)

# Added to attention scores where the mask is false. Finite, so that a row that is masked throughout
# gives uniform weights and not NaN.
MASKED = -1e10

# The scores of a head that are made at once, and the fewest queries that they are made for.
SCORES, QUERIES = 1 << 20, 64

# The kernel takes so many queries and keys at a time: the first of these that divides the length.
_PIECES = (512, 256, 128)

Dropout = Callable[[jax.Array], jax.Array]


class CausalBias(struct.PyTreeNode):
    """Each position sees the real ones in the slots up to its own.

    mask: true at real positions.
    positions: how many real ones come before each slot.
    window: how many of them, itself included, a position sees; None: all.
    """

    mask: Bool[AnyArray, "B T"]
    positions: Int32[Array, "B T"]
    window: int | Int32[Array, ""] | None

    def rows(self, start: int | jax.Array, count: int) -> Float32[Array, "B 1 {count} T"]:
        """The bias of `count` queries, from the one in slot `start` on."""
        slots, own = jnp.arange(self.mask.shape[1]), start + jnp.arange(count)
        visible = jnp.asarray(self.mask)[:, None, :] & (slots[None, :] <= own[:, None])[None]
        if self.window is not None:
            at = jnp.take(self.positions, own, axis=1, mode="clip")
            visible = visible & (at[:, :, None] - self.positions[:, None, :] < self.window)
        return mask_bias(visible)[:, None]


class DistanceBias(struct.PyTreeNode):
    """Each position sees all real ones, with a bias by their distance, as in T5's encoder.

    mask: true at real positions.
    by_distance: of keys from T - 1 slots before a query to T - 1 after it.
    """

    mask: Bool[AnyArray, "B T"]
    by_distance: Float32[Array, "N 2*T-1"]

    def rows(self, start: int | jax.Array, count: int) -> Float32[Array, "B N {count} T"]:
        """The bias of `count` queries, from the one in slot `start` on."""
        heads, keys = self.by_distance.shape[0], self.mask.shape[1]
        # What the block's last query has of the first key, and on; it may lie beyond the end.
        padded = jnp.pad(self.by_distance, ((0, 0), (count, 0)))
        near = keys + count - 1
        held = jax.lax.dynamic_slice_in_dim(padded, keys - start, near, axis=1)
        # Each query has the same numbers as the one before, one place further right. Numbers that
        # repeat after `near` + 1 and are read in rows of `near` move so. A gather, which takes each
        # by itself, is slow on accelerators.
        repeated = jnp.tile(jnp.pad(held, ((0, 0), (0, 1))), (1, count))
        rows = repeated[:, : count * near].reshape(heads, count, near)[:, :, count - 1 :]
        return rows[None] + mask_bias(self.mask)[:, None, None, :]


Bias = jax.Array | CausalBias | DistanceBias


def mask_bias(mask: Bool[AnyArray, "*shape"]) -> Float32[Array, "*shape"]:
    """0 where true, a large negative number where false."""
    return jnp.where(mask, 0.0, MASKED)


def at_once(queries: int, keys: int) -> bool:
    """Whether the scores of so many queries and keys are made at once, and their bias too."""
    return queries <= QUERIES or queries * keys <= SCORES


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
        whole = bias if isinstance(bias, jax.Array) else bias.rows(0, queries)
        weights = _weights(query, key_value.key, whole, scale)
        return products.by_values(weights if dropout is None else dropout(weights), key_value.value)
    blocks = functools.partial(_by_blocks, scale=scale, dropout=dropout)
    if dropout is not None or not _has_kernel(query, key_value, bias):
        _say(f"attention to {keys:,} keys: in blocks of {_block(keys)} queries")
        return blocks(query, key_value, bias)
    _say(
        f"attention to {keys:,} keys: on a TPU by splash attention, elsewhere in blocks of "
        f"{_block(keys)} queries"
    )
    kernel = functools.partial(by_kernel, scale=scale)
    return jax.lax.platform_dependent(query, key_value, bias, tpu=kernel, default=blocks)


@functools.cache
def _say(what: str) -> None:
    """Logs it, once for all layers."""
    log.info("%s", what)


def _weights(
    query: Float[Array, "B N Q H"],
    key: Float[Array, "B G K H"],
    bias: Float32[Array, "#B #N #Q #K"],
    scale: float,
) -> Float[Array, "B N Q K"]:
    scores = products.by_keys(query, key) * scale + bias
    return jax.nn.softmax(scores, axis=-1).astype(query.dtype)


def _block(keys: int) -> int:
    """How many queries are in a block."""
    return max(QUERIES, SCORES // keys)


def _by_blocks(
    query: Float[Array, "B N Q H"],
    key_value: KeyValue,
    bias: Bias,
    scale: float,
    dropout: Dropout | None,
) -> Float[Array, "B Q N*H"]:
    """As `attend`, for one block of queries after the other."""
    rows, heads, queries, width = query.shape
    keys = key_value.key.shape[2]
    size = min(_block(keys), queries)
    count = -(-queries // size)
    room = ((0, 0), (0, 0), (0, count * size - queries), (0, 0))
    blocks = jnp.pad(query, room).reshape(rows, heads, count, size, width)
    if isinstance(bias, jax.Array) and bias.shape[2] > 1:
        bias = jnp.pad(bias, room)
    kept = None if dropout is None else dropout(jnp.ones((rows, heads, 1, keys), query.dtype))
    # Their gradients are added up over the blocks, which bfloat16 is too short for.
    held = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), key_value)

    @jax.checkpoint
    def mix(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        index, own = block
        key, value = (leaf.astype(query.dtype) for leaf in (held.key, held.value))
        weights = _weights(own, key, _rows(bias, index * size, size), scale)
        return products.by_values(weights if kept is None else weights * kept, value)

    mixed = jax.lax.map(mix, (jnp.arange(count), jnp.moveaxis(blocks, 2, 0)))
    return jnp.moveaxis(mixed, 0, 1).reshape(rows, count * size, heads * width)[:, :queries]


def _rows(bias: Bias, start: jax.Array, count: int) -> Float32[Array, "#B #N #{count} #K"]:
    """The bias of `count` queries from `start` on."""
    if not isinstance(bias, jax.Array):
        return bias.rows(start, count)
    return jax.lax.dynamic_slice_in_dim(bias, start, count, axis=2) if bias.shape[2] > 1 else bias


def _has_kernel(query: jax.Array, key_value: KeyValue, bias: Bias) -> bool:
    """Whether `by_kernel` can do it: a window counts positions, of which padding has none."""
    if not isinstance(bias, CausalBias) or bias.window is not None:
        return False
    rows, heads, length, _ = query.shape
    if length % _PIECES[-1]:
        return False
    mesh = program_mesh()
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

    What padding sees is other padding, so its results are others than those of `attend`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, heads, length, width = query.shape
    piece = next(size for size in _PIECES if length % size == 0)
    sizes = dict.fromkeys(
        (f"block_{name}" for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")), piece
    )

    def run(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * query.shape[1])
        kernel = splash.make_splash_mha(
            causal,
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        segments = mask.astype(jnp.int32)
        ids = splash.SegmentIds(segments, segments)
        return jax.vmap(kernel)(query * jnp.asarray(scale, query.dtype), key, value, ids)

    if program_mesh() is not None:
        split, by_row = P(ROWS, "tensor"), P(ROWS)
        run = jax.shard_map(
            run, in_specs=(split, split, split, by_row), out_specs=split, check_vma=False
        )
    mixed = run(query, key_value.key, key_value.value, jnp.asarray(bias.mask))
    return mixed.transpose(0, 2, 1, 3).reshape(rows, length, heads * width)
