"""How exact the gradient of bfloat16 products is, summed over devices in float32 and in bfloat16.

python benchmarks/sums.py --devices=8,64

A random GPT-2 of two layers reads a batch of 128 rows. On as many fake CPU devices as are asked
for, each with as many rows, its gradient is compared with that of the same batch on one device.
In bfloat16 it is worked out here: each device's part is rounded, and one is added to the other.
"""

from __future__ import annotations

import os

from l2s_jax.arguments import Parser, integers

ROWS, TOKENS, VOCABULARY = 128, 16, 512


def main() -> None:
    """Prints a table: devices, and the relative error of either sum."""
    parser = Parser(description="Sums of gradients over devices.", allow_abbrev=False)
    parser.add_argument("--devices", type=integers, default=[8, 64], help="numbers that divide 128")
    counts = parser.parse_args().devices
    if any(ROWS % count for count in counts):
        parser.error(f"--devices={counts}: expected divisors of {ROWS}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    flag = f"--xla_force_host_platform_device_count={max(counts)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from l2s_jax.cluster import sharding
    from l2s_jax.models.gpt2 import GPT2Config
    from l2s_jax.models.systems import LanguageModel
    from l2s_jax.training.update import batch_loss

    config = GPT2Config(VOCABULARY, 64, 2, 256, 2, max_positions=64, dtype=jnp.bfloat16)
    system = LanguageModel("slm", config)
    params = jax.jit(system.init)(jax.random.key(0))
    ids = np.random.default_rng(0).integers(2, VOCABULARY, (2, ROWS, TOKENS), dtype=np.int32)
    mask = np.ones(ids.shape[1:], bool)
    names = "slm_prompt", "response"
    batch = {f"{name}_ids": own for name, own in zip(names, ids, strict=True)}
    batch |= {f"{name}_mask": mask for name in names}

    @jax.jit
    def gradient(params, batch):
        return jax.grad(lambda p: batch_loss(system, p, {}, batch, None, 0.0)[0])(params)

    def error(found):
        apart = jax.tree.map(jnp.subtract, jax.device_get(found), expected)
        return float(optax.tree.norm(apart) / optax.tree.norm(expected))

    expected = jax.device_get(gradient(params, batch))
    print("| devices | in float32 | in bfloat16 |\n|---:|---:|---:|")
    for count in counts:
        mesh = sharding.make_mesh({"data": count}, jax.devices()[:count])
        with jax.set_mesh(mesh):
            where = sharding.put_parameters(params, mesh)
            found = gradient(where, sharding.put_batch(batch, mesh))
        total = None
        for part in range(count):
            own = {name: x[part::count] for name, x in batch.items()}
            rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradient(params, own))
            total = rounded if total is None else jax.tree.map(jnp.add, total, rounded)
        print(f"| {count} | {error(found):.1e} | {error(total):.1e} |")


if __name__ == "__main__":
    main()
