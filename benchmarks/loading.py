"""Loading a T5-Large encoder from safetensors: seconds and memory, ours beside transformers'.

    python benchmarks/loading.py

Writes a random checkpoint of T5-Large's geometry (2.95 GB) to a temporary directory. Each loading
is a process of its own, the two in turn; the file is in the page cache for both. Needs torch and
transformers.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

REPEATS = 5
ENCODER_BYTES = 4 * 334_939_648


def write_checkpoint(directory: str) -> None:
    """T5-Large with random weights, as transformers saves it."""
    import torch
    import transformers

    config = transformers.T5Config(
        d_model=1024, d_ff=4096, num_layers=24, num_heads=16, decoder_start_token_id=0
    )
    torch.set_default_dtype(torch.float32)
    transformers.T5ForConditionalGeneration(config).save_pretrained(directory)


def load(which: str, directory: str) -> None:
    """Prints seconds and the memory that loading took at its peak, as JSON."""
    if which == "l2s_jax":
        from l2s_jax.convert import load_encoder

        def run() -> object:
            return load_encoder(directory)
    else:
        import transformers

        transformers.utils.logging.disable_progress_bar()

        def run() -> object:
            model = transformers.T5EncoderModel.from_pretrained(directory)
            # Weights that are still mapped from the file are read on first use: count that too.
            return model, sum(float(p.sum()) for p in model.parameters())

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": seconds, "peak_bytes": peak * 1024}))
    del kept


def main() -> None:
    """Both, in turn; medians."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, __file__, "write", directory], check=True)
        results: dict[str, list[dict[str, float]]] = {"l2s_jax": [], "transformers": []}
        for repeat in range(REPEATS + 1):
            for which, found in results.items():
                output = subprocess.run(
                    [sys.executable, __file__, which, directory],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                if repeat:  # the first only warms the page cache
                    found.append(json.loads(output.stdout.splitlines()[-1]))
    print("| | seconds | peak memory / weights |\n|---|---|---|")
    for which, found in results.items():
        seconds, peak = (
            statistics.median(one[key] for one in found) for key in ("seconds", "peak_bytes")
        )
        print(f"| {which} | {seconds:.2f} | {peak / ENCODER_BYTES:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "write":
        write_checkpoint(sys.argv[2])
    else:
        load(*sys.argv[1:])
