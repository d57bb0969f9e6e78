#!/usr/bin/env bash
# Submits one experiment to Slurm, one process for each GPU; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/gpu_slurm.sh [OPTION...] CONFIG [-- FLAG...]

Submits CONFIG (configs/NAME.py, or NAME) as a job of one process for each GPU, with the workdir
DIR/NAME and the log DIR/NAME/logs/slurm-JOB.log. A job that is preempted, or whose node fails, is
put into the queue again and continues where it stopped; so does the same command again.

  --nodes=N   how many nodes (default: 1)
  --gpus=G    GPUs of each node (default: 8)
  --runs=DIR  where the workdirs are, on a file system that all nodes share (default: runs)
  --dry-run   print the commands, run nothing
  FLAG...     given to every process, such as --config.seed=1 or --mode=evaluate

PYTHON is the interpreter on the nodes (default: .venv/bin/python where there is one, else
python3). sbatch reads everything else from the environment or the cluster's defaults:
SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT and so on.

  SBATCH_PARTITION=gpu launch/gpu_slurm.sh --nodes=2 wmt14_en_de -- --config.seed=1
TEXT
}

fail() {
  echo "launch/gpu_slurm.sh: $1" >&2
  exit 2
}

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=false
nodes=1
gpus=8
runs=runs
name=
while (($#)); do
  case $1 in
    --help | -h) usage; exit ;;
    --dry-run) dry_run=true ;;
    --nodes=*) nodes=${1#--nodes=} ;;
    --gpus=*) gpus=${1#--gpus=} ;;
    --runs=?*)
      runs=${1#--runs=}
      [[ $runs == /* ]] || runs=$caller/$runs
      ;;
    --) shift; break ;;
    -*) fail "unknown option $1 (flags of the run itself go behind --)" ;;
    *)
      [[ -z $name ]] || fail "one config at a time, got $name and $1"
      name=$(basename "$1" .py)
      [[ -f configs/$name.py ]] || fail "no such config: configs/$name.py"
      ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$nodes: expected a number above 0"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus=$gpus: expected a number above 0"
[[ -n $name ]] || fail "no config given; see --help"
"$dry_run" || command -v sbatch >/dev/null || fail "sbatch is not installed"

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi

call() {
  printf '%q ' "$@"
  echo
  "$dry_run" || "$@"
}

step=(srun --kill-on-bad-exit=1 "$PYTHON" -m l2s_jax.main "--config=configs/$name.py")
step+=("--workdir=$runs/$name" "$@")
call mkdir -p "$runs/$name/logs"
# Every process sees all GPUs of its node and takes the one of its number on it.
call sbatch "--job-name=l2s-$name" "--chdir=$PWD" "--nodes=$nodes" "--ntasks-per-node=$gpus" \
  "--gpus-per-node=$gpus" --requeue --open-mode=append "--output=$runs/$name/logs/slurm-%j.log" \
  "--wrap=$(printf '%q ' "${step[@]}")"
