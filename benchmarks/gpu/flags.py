"""Flags of XLA that may make a decoding step faster on a GPU: what the part *profile* tries.

The package sets none. XLA of JAX 0.10 to 0.12 by itself launches a decoding step as one CUDA graph,
times its choices of products and fusions, and keeps what it found in JAX's compilation cache. What
older guides ask for is on already, or gone.

XLA ends a process that has a flag which it does not know, and flags come and go. All of these are
known to jaxlib 0.10.2, 0.11.2 and 0.12.0, on a CPU and in the CUDA plugin; a test asks the version
that is installed.
"""

from __future__ import annotations

# By a name for tables, the most promising first. Source of the first four and the last:
# docs/command_buffer_tutorial.md of openxla/xla; of the others xla/debug_options_flags.cc.
CANDIDATES: dict[str, str] = {
    # The loop too, all chunks of it: no host between two steps, and none waits for a chunk's end.
    "loop in one graph, turns unrolled": (
        "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_command_buffer_unroll_loops=true"
    ),
    # The same with a conditional node for each turn, which costs the device something.
    "loop in one graph": "--xla_gpu_enable_command_buffer=+WHILE",
    # Small kernels that do not wait for each other at once, such as a layer's two cache writes.
    "kernels side by side": "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT_REGIONS",
    "kernels one by one": "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE",
    # 88 instead of 92 kernels in a step of T5-small.
    "fusions of several results": "--xla_gpu_unsupported_enable_triton_multi_output_fusion=true",
    # More tilings of each product are timed: it compiles longer.
    "all tilings": "--xla_gpu_exhaustive_tiling_search=true",
    # Expected to be worse, 148 kernels instead of 92: what Triton's products are good for.
    "products by cuBLAS": "--xla_gpu_enable_triton_gemm=false",
    # Expected to be worse: what graphs are good for.
    "no graphs": "--xla_gpu_enable_command_buffer=",
}
