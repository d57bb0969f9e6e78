"""Files that a benchmark leaves: each is replaced as a whole, whatever stops the benchmark."""

from __future__ import annotations

import json
import math
import os
from typing import Any


def replace_file(path: str, content: bytes) -> None:
    """Writes a file beside the one of that name, then puts it in its place."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
    os.replace(f"{path}.tmp", path)


def write_json(path: str, value: Any) -> None:
    """Replaces a JSON file; a number that is not finite becomes null, as JSON has none."""
    replace_file(path, (json.dumps(_finite(value), indent=2) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
