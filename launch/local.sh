#!/usr/bin/env bash
# Runs experiments one after another on this machine; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local.sh [--dry-run] [--runs=DIR] CONFIG... [-- FLAG...]

Runs each CONFIG (a path, or NAME for configs/NAME.py) with the workdir DIR/NAME, one after another,
and stops at the first that fails. The same command again continues where it stopped.

  --dry-run   print the commands, run nothing
  --runs=DIR  where the workdirs are (default: runs)
  FLAG...     given to every run, such as --config.seed=1 or --mode=evaluate

PYTHON is the interpreter (default: .venv/bin/python where there is one, else python3).

  launch/local.sh quickstart multi30k_en_de -- --config.labels.source=llm
TEXT
}

fail() {
  echo "launch/local.sh: $1" >&2
  exit 2
}

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source launch/common.bash
dry_run=false
runs=runs
configs=()
while (($#)); do
  case $1 in
    --help | -h) usage; exit ;;
    --dry-run) dry_run=true ;;
    --runs=?*)
      runs=${1#--runs=}
      [[ $runs == /* ]] || runs=$caller/$runs
      ;;
    --) shift; break ;;
    -*) fail "unknown option $1 (flags of the run itself go behind --)" ;;
    *)
      config=$(find_config "$caller" "$1")
      configs+=("$config")
      ;;
  esac
  shift
done
((${#configs[@]})) || fail "no config given; see --help"

for config in "${configs[@]}"; do
  workdir=$runs/$(basename "$config" .py)
  command=("$PYTHON" -m l2s_jax.main "--config=$config" "--workdir=$workdir" "$@")
  printf '%q ' "${command[@]}"
  echo
  "$dry_run" || "${command[@]}"
done
