#!/usr/bin/env bash
# Submits one experiment to Slurm, one process for each GPU; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/gpu_slurm.sh [OPTION...] CONFIG [-- FLAG...]

Submits CONFIG (a path, or NAME for configs/NAME.py) as a job of one process for each GPU, with the
workdir DIR/NAME and the log DIR/NAME/logs/slurm-JOB.log. A job that is preempted, or whose node
fails, is put into the queue again and continues where it stopped; so does the same command again.

  --nodes=N   how many nodes (default: 1)
  --gpus=G    GPUs of each node (default: 8)
  --cpus=C    CPUs of each process (default: the cluster's, often a single one; a process can use
              eight, to compile, read and tokenize)
  --runs=DIR  where the workdirs are, on a file system that all nodes share (default: runs)
  --dry-run   print the commands, run nothing
  FLAG...     given to every process, such as --config.seed=1 or --mode=evaluate

PYTHON is the interpreter on the nodes (default: .venv/bin/python where there is one, else
python3). sbatch reads everything else from the environment or the cluster's defaults:
SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_MEM_PER_GPU and so on.

  SBATCH_PARTITION=gpu launch/gpu_slurm.sh --nodes=2 wmt14_en_de -- --config.seed=1
TEXT
}

fail() {
  echo "launch/gpu_slurm.sh: $1" >&2
  exit 2
}

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source launch/common.bash
dry_run=false
nodes=1
gpus=8
cpus=
runs=runs
config=
while (($#)); do
  case $1 in
    --help | -h) usage; exit ;;
    --dry-run) dry_run=true ;;
    --nodes=*) nodes=${1#--nodes=} ;;
    --gpus=*) gpus=${1#--gpus=} ;;
    --cpus=*)
      cpus=${1#--cpus=}
      [[ $cpus =~ ^[1-9][0-9]*$ ]] || fail "--cpus=$cpus: expected a number above 0"
      ;;
    --runs=?*)
      runs=${1#--runs=}
      [[ $runs == /* ]] || runs=$caller/$runs
      ;;
    --) shift; break ;;
    -*) fail "unknown option $1 (flags of the run itself go behind --)" ;;
    *)
      [[ -z $config ]] || fail "one config at a time, got $config and $1"
      config=$(find_config "$caller" "$1")
      ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$nodes: expected a number above 0"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus=$gpus: expected a number above 0"
[[ -n $config ]] || fail "no config given; see --help"
"$dry_run" || command -v sbatch >/dev/null || fail "sbatch is not installed"

call() {
  printf '%q ' "$@"
  echo
  "$dry_run" || "$@"
}

name=$(basename "$config" .py)
# srun does not ask sbatch how many CPUs a process has.
per_process=(${cpus:+"--cpus-per-task=$cpus"})
step=(srun --kill-on-bad-exit=1 "${per_process[@]}" "$PYTHON" -m l2s_jax.main)
step+=("--config=$config" "--workdir=$runs/$name" "$@")
call mkdir -p "$runs/$name/logs"
# Every process sees all GPUs of its node and takes the one of its number on it.
call sbatch "--job-name=l2s-$name" "--chdir=$PWD" "--nodes=$nodes" "--ntasks-per-node=$gpus" \
  "--gpus-per-node=$gpus" "${per_process[@]}" --requeue --open-mode=append \
  "--output=$runs/$name/logs/slurm-%j.log" \
  "--wrap=$(printf '%q ' "${step[@]}")"
