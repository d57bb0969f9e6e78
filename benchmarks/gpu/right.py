"""Whether the models are right on this device, beside transformers and in any company.

    python -m benchmarks.gpu.right --output=right.json

Small random checkpoints, one of each family, in this order:

1. Products. JAX's default for float32 is TF32 on GPUs that have it, whose errors are
   hundreds of times those of float32 (JAX's documentation, "Matmul precision"). The first table
   measures both; all that is done in float32 below asks for "highest". PyTorch's default is
   float32.
2. Logits of responses to padded prompts. In float32 they differ from transformers' by at most 1e-5
   of the largest. In bfloat16 they differ from transformers' float32 logits of the same weights by
   at most 1.5 times what transformers' own bfloat16 differs, in root mean square. Ours should
   differ less: residual stream, norms and logits are float32, where transformers rounds them.
3. Greedy responses in float32 are transformers', token for token.
4. Rows say the same in a batch, alone, with more padding on either side, and among other rows, in
   both dtypes: one encoder-decoder and one decoder-only model, each five programs more.
5. What 4 beams find in float32 is what transformers' find, token for token.

Outputs may part at a tie, which is named. Of greedy ones: the logits of the two tokens are as close
as rounding moves them. In float32 that is twice 1e-5 of the largest logit; in bfloat16, six times
the root mean square error of ours, see right_checks.py. Of beams: transformers says the same if its
logits are moved by 1e-5 of the largest, in one of some draws. All else that parts is a fault.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.gpu import part
from benchmarks.gpu.right_checks import (
    CARD,
    DEVIATIONS,
    DTYPES,
    REHEARSAL,
    Difference,
    Size,
    Subject,
    decode,
    differences,
    draw_prompts,
    in_every_company,
    logits,
    make_subject,
    product_error,
    rms,
)
from benchmarks.gpu.right_tables import (
    COMPANY,
    LOGITS,
    PARTED,
    PRODUCTS,
    RATIO,
    RESPONSES,
    TABLES,
    TOLERANCE,
)
from l2s_jax.checkpoints.pretrained import load_hf
from l2s_jax.decoding.engine import GREEDY, jitted_decode
from l2s_jax.settings.search import Search

BEAMS = Search(num_beams=4)
# Of transformers' logits, to see whether a beam search that differs is a tie.
DRAWS = 16
COMPARED = (
    ("one batch", "alone"),
    ("padded on the left", "alone"),
    ("padded on the right", "alone"),
    ("among others", "one batch"),
)


class Right:
    """The checks of one run, and what came of them."""

    def __init__(self, result: part.Result, size: Size, program: Callable, limit_s: float):
        self.failures: list[str] = []
        self._result = result
        self._size = size
        self._program = program
        self._deadline = time.monotonic() + limit_s
        self._longest = 0.0
        self._rows: dict[str, list[tuple[part.Cell, ...]]] = {title: [] for title in TABLES}
        self._seconds = result.data["seconds"] = {}
        for title in TABLES:
            self._add(title)

    def _add(self, title: str, *rows: tuple[part.Cell, ...]) -> None:
        columns, note = TABLES[title]
        self._rows[title] += rows
        self._result.table(title, columns, self._rows[title], note)

    def _hold(self, name: str, holds: bool, otherwise: str) -> str:
        if not holds:
            self.failures.append(f"{name}: {otherwise}")
        return "yes" if holds else "no"

    def attempt(self, name: str, check: Callable[..., Any], *args: Any) -> Any:
        """What the check gives; None if it failed or if there may be no time for it."""
        began = time.monotonic()
        if began + self._longest > self._deadline:
            self._result.skip(name, "no time was left")
            return None
        try:
            return check(*args)
        except Exception as error:  # whatever one check fails with, the others are made
            message = " ".join(str(error).split())[:200]
            self.failures.append(f"{name}: {type(error).__name__}: {message}")
            self._result.data.setdefault("tracebacks", {})[name] = traceback.format_exc()
        finally:
            seconds = time.monotonic() - began
            self._longest = max(self._longest, seconds)
            self._seconds[name] = round(seconds, 2)
            self._result.write()
        return None

    def products(self) -> None:
        """Of both precisions; float32 must be there where it is asked for."""
        for level in ("default", "highest"):
            error = product_error(None if level == "default" else level)
            self._add(PRODUCTS, (level, error))
        self._hold("products", error <= TOLERANCE, f"an error of {error:.2g} at highest precision")

    def logits(self, subject: Subject) -> None:
        """Of both dtypes, teacher-forced."""
        prompts = draw_prompts(self._size, "both", seed=1)
        theirs, ours = {}, {}
        for dtype in DTYPES:
            theirs[dtype] = subject.reference.logits(prompts, subject.said, dtype)
            ours[dtype] = logits(subject, prompts, subject.said, dtype)
        true = theirs["float32"]
        scale = np.abs(true).max()
        difference = float(np.abs(ours["float32"] - true).max() / scale)
        errors = [(side["bfloat16"] - true) / scale for side in (ours, theirs)]
        largest = [float(np.abs(error).max()) for error in errors]
        mean = [rms(error) for error in errors]
        ratio = mean[0] / mean[1]
        holds = self._hold(
            f"logits of {subject.name}",
            difference <= TOLERANCE and ratio <= RATIO,
            f"float32 differs by {difference:.2g}, bfloat16 errs by {ratio:.2g} times "
            "transformers' error",
        )
        numbers = (difference, *largest, *mean, ratio)
        self._add(LOGITS, (subject.name, subject.reference.parameters, *numbers, holds))

    def _parted(
        self,
        names: Sequence[str],
        found: Sequence[Difference],
        scale: float,
        is_tie: Callable[[Difference], bool],
    ) -> int:
        """Puts the differences in their table; how many are ties."""
        ties = [is_tie(one) for one in found]
        for one, tie in zip(found, ties, strict=True):
            sizes = one.margin / scale, one.gap / scale
            self._add(PARTED, (*names, one.row, one.step, *sizes, "tie" if tie else "fault"))
        return sum(ties)

    def responses(self, subject: Subject, search: Search) -> None:
        """Of a search, to prompts that are padded."""
        size, prompts, reference = self._size, subject.prompts, subject.reference
        what = "greedy" if search == GREEDY else f"{search.num_beams} beams"
        theirs, their_scores = reference.generate(
            prompts, size.new, search.num_beams, subject.eos_id
        )
        ours, our_scores = decode(subject, prompts, size, "float32", search, self._program)
        scores = logits(subject, prompts, theirs, "float32")
        scale = float(np.abs(scores).max())
        found = differences(theirs, ours, scores)
        moved = None
        if search.num_beams > 1:
            same = (theirs == ours).all(1)
            moved = float(np.abs(our_scores - their_scores)[same].max(initial=0))

        def is_tie(one: Difference) -> bool:
            if search.num_beams == 1:
                return one.gap <= 2 * TOLERANCE * scale
            return reference.may_say(
                prompts.row(one.row),
                ours[one.row],
                search.num_beams,
                subject.eos_id,
                TOLERANCE * scale,
                DRAWS,
            )

        name = (subject.name, "float32", "ours, " + what, "transformers'")
        ties = self._parted(name, found, scale, is_tie)
        # Each log p is of a logit and of the logarithm of a sum: both may move by the tolerance.
        holds = self._hold(
            f"{what} of {subject.name}",
            ties == len(found) and (moved is None or moved <= 2 * TOLERANCE * scale),
            f"{len(found) - ties} of {size.rows} rows differ, scores by {moved}",
        )
        ended = int((ours == subject.eos_id).any(1).sum())
        row = (subject.name, what, size.rows, ended, len(found), ties, moved, holds)
        self._add(RESPONSES, row)

    def company(self, subject: Subject, dtype: str) -> None:
        """Greedy responses of the same rows, run in every way."""

        def run(prompts: Any) -> np.ndarray:
            return decode(subject, prompts, self._size, dtype, program=self._program)[0]

        said = in_every_company(subject.prompts, self._size, run)
        for one, other in COMPARED:
            scores, exact = (
                logits(subject, subject.prompts, said[other], kind) for kind in (dtype, "float32")
            )
            scale = float(np.abs(exact).max())
            rounding = 2 * TOLERANCE * scale
            if dtype == "bfloat16":
                rounding = DEVIATIONS * rms(scores - exact)
            found = differences(said[other], said[one], scores)
            names = (subject.name, dtype, one, other)
            ties = self._parted(names, found, scale, lambda gap, most=rounding: gap.gap <= most)
            holds = self._hold(
                f"{subject.name} in {dtype}, {one} and {other}",
                ties == len(found),
                f"{len(found) - ties} of {self._size.rows} rows differ by more than rounding",
            )
            largest = max((each.gap for each in found), default=0.0) / scale
            counts = (len(found), ties, largest, rounding / scale, holds)
            self._add(COMPANY, (subject.name, dtype, self._size.rows, one, other, *counts))


def run(
    result: part.Result,
    size: Size,
    limit_s: float = math.inf,
    models: Sequence[str] | None = None,
    load: Callable[..., Any] = load_hf,
    program: Callable[..., Any] = jitted_decode,
) -> list[str]:
    """Makes the checks, or those of some `models`; what failed, a line each.

    `load` and `program` are what is checked.
    """
    try:
        import torch
        import transformers

        from benchmarks.gpu import right_reference
    except ModuleNotFoundError as error:
        result.skip("right", f"needs torch and transformers: {error}")
        return []
    except ImportError as error:  # packages that do not fit each other
        return [f"torch or transformers: {' '.join(str(error).split())[:200]}"]
    device = right_reference.find_device()
    if size.width == REHEARSAL.width:
        torch.set_num_threads(1)  # threads of small products wait for each other
    result.data["versions"] = {
        "jax": jax.__version__,
        "jax_device": jax.devices()[0].device_kind,
        "torch": torch.__version__,
        "torch_device": device,
        "transformers": transformers.__version__,
    }
    right = Right(result, size, program, limit_s)
    right.attempt("products", right.products)

    def make(name: str, config: Any) -> Subject:
        with tempfile.TemporaryDirectory() as directory:
            reference = right_reference.Reference(config, directory, device)
            return make_subject(name, reference, *load(directory), size)

    subjects = []
    for name, config in right_reference.model_configs(size).items():
        if models is not None and name not in models:
            continue
        subject = right.attempt(f"checkpoint of {name}", make, name, config)
        if subject is not None:
            subjects.append(subject)
            right.attempt(f"logits of {name}", right.logits, subject)
    searched = [subject for subject in subjects if subject.name in size.searched]
    for subject in searched:
        right.attempt(f"greedy of {subject.name}", right.responses, subject, GREEDY)
    for subject in subjects:
        for dtype in DTYPES if subject.name in size.in_company else ():
            name = f"company of {subject.name} in {dtype}"
            right.attempt(name, right.company, subject, dtype)
    for subject in searched:
        right.attempt(f"beams of {subject.name}", right.responses, subject, BEAMS)
    return right.failures


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    options = part.arguments(__doc__.splitlines()[0], argv)
    result = part.Result(options.output)
    if not options.rehearse:
        return part.finish(result, run(result, CARD, options.limit_s))
    # A rehearsal spends its time in compiling.
    jax.config.update("jax_disable_most_optimizations", True)
    return part.finish(result, run(result, REHEARSAL, options.limit_s))


if __name__ == "__main__":
    sys.exit(main())
