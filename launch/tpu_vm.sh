#!/usr/bin/env bash
# Creates a one-host Cloud TPU VM, installs this repository on it, runs it, deletes it; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_vm.sh [--dry-run] create|setup|delete
       launch/tpu_vm.sh [--dry-run] run CONFIG [FLAG...]
       launch/tpu_vm.sh [--dry-run] fetch CONFIG

  create  makes the TPU VM
  setup   copies the commit that is checked out, and installs it with the constraints file
  run     trains and evaluates configs/CONFIG.py in runs/CONFIG on the VM; FLAG... as for
          l2s_jax.main; the same command again continues where it stopped
  fetch   copies the report of CONFIG and its predictions to runs/CONFIG
  delete  deletes the VM and all that is on it

From the environment: NAME (default l2s), ZONE (us-central1-a), TYPE (v5litepod-8), IMAGE
(v2-alpha-tpuv5-lite). TYPE must be a slice that one host holds. gcloud must be installed, with a
project and credentials. --dry-run prints each command and runs none.
TEXT
}

fail() {
  echo "launch/tpu_vm.sh: $1" >&2
  exit 2
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${NAME:-l2s}
zone=${ZONE:-us-central1-a}
type=${TYPE:-v5litepod-8}
image=${IMAGE:-v2-alpha-tpuv5-lite}
tpu=(gcloud compute tpus tpu-vm)

dry_run=false
call() {
  printf '%q ' "$@"
  echo
  "$dry_run" || "$@"
}

on_vm() {
  call "${tpu[@]}" ssh "$name" "--zone=$zone" "--command=$1"
}

check_config() {
  [[ -n ${1:-} ]] || fail "$action needs a config; see --help"
  [[ -f configs/$1.py ]] || fail "no such config: configs/$1.py"
}

if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
action=${1:-}
shift || true
case $action in
  --help | -h) usage ;;
  create)
    call "${tpu[@]}" create "$name" "--zone=$zone" "--accelerator-type=$type" "--version=$image"
    ;;
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    call git archive --format=tar.gz "--output=$archive" HEAD
    call "${tpu[@]}" scp "$archive" "$name:l2s_jax.tar.gz" "--zone=$zone"
    # The images' own Python is older than 3.11, so uv brings one.
    on_vm "mkdir -p l2s_jax && tar -xzf l2s_jax.tar.gz -C l2s_jax && cd l2s_jax \
&& python3 -m pip install -q --user uv \
&& python3 -m uv venv -q --allow-existing --python 3.11 .venv \
&& python3 -m uv pip install -q --python .venv/bin/python -c constraints.txt -e . 'jax[tpu]' \
&& .venv/bin/python -c 'import jax; print(jax.devices())'"
    ;;
  run)
    check_config "${1:-}"
    config=$1
    shift
    flags=""
    (($# == 0)) || flags=$(printf ' %q' "$@")
    on_vm "cd l2s_jax && .venv/bin/python -m l2s_jax.main --config=configs/$config.py\
 --workdir=runs/$config$flags"
    ;;
  fetch)
    check_config "${1:-}"
    call mkdir -p "runs/$1"
    remote=()
    for file in config.json report.json report.md quality_latency.png quality_latency.svg \
      predictions; do
      remote+=("$name:l2s_jax/runs/$1/$file")
    done
    call "${tpu[@]}" scp --recurse "${remote[@]}" "runs/$1" "--zone=$zone"
    ;;
  delete) call "${tpu[@]}" delete "$name" "--zone=$zone" --quiet ;;
  *) fail "expected create, setup, run, fetch or delete, got '$action'; see --help" ;;
esac
