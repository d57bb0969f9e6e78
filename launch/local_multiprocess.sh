#!/usr/bin/env bash
# Runs one experiment as several processes on this machine; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local_multiprocess.sh [OPTION...] --processes=N CONFIG [-- FLAG...]

Runs CONFIG (a path, or NAME for configs/NAME.py) as one job of N processes with the workdir
DIR/NAME. The output of process I goes to DIR/NAME/logs/process-I.log, that of process 0 to the
terminal too. Ctrl-C, or one process that fails, ends all. The same command again continues where it
stopped, with any N.

  --processes=N  how many
  --device=KIND  cpu (default): one CPU device each; gpu: GPU number I for process I
  --port=PORT    where process 0 listens (default: a random one)
  --runs=DIR     where the workdirs are (default: runs)
  --dry-run      print the commands, run nothing
  FLAG...        given to every process, such as --config.seed=1 or --mode=evaluate

PYTHON is the interpreter (default: .venv/bin/python where there is one, else python3).

  launch/local_multiprocess.sh --processes=2 quickstart -- --config.labels.source=llm
TEXT
}

fail() {
  echo "launch/local_multiprocess.sh: $1" >&2
  exit 2
}

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source launch/common.bash
dry_run=false
device=cpu
port=$((20000 + RANDOM % 10000))
runs=runs
processes=
config=
while (($#)); do
  case $1 in
    --help | -h) usage; exit ;;
    --dry-run) dry_run=true ;;
    --processes=*) processes=${1#--processes=} ;;
    --device=*) device=${1#--device=} ;;
    --port=*) port=${1#--port=} ;;
    --runs=?*)
      runs=${1#--runs=}
      [[ $runs == /* ]] || runs=$caller/$runs
      ;;
    --) shift; break ;;
    -*) fail "unknown option $1 (flags of the run itself go behind --)" ;;
    *)
      [[ -z $config ]] || fail "one config at a time, got $config and $1"
      config=$1
      ;;
  esac
  shift
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes=$processes: expected a number above 0"
[[ $port =~ ^[0-9]+$ ]] || fail "--port=$port: expected a number"
[[ $device == cpu || $device == gpu ]] || fail "--device=$device: expected cpu or gpu"
[[ -n $config ]] || fail "no config given; see --help"
file=$(find_config "$caller" "$config")

if ! "$dry_run"; then
  command -v "$PYTHON" >/dev/null || fail "no such interpreter: PYTHON=$PYTHON"
  if [[ $device == gpu ]]; then
    command -v nvidia-smi >/dev/null || fail "--device=gpu: nvidia-smi is not installed"
    gpus=$(nvidia-smi --list-gpus | wc -l)
    ((gpus >= processes)) || fail "--processes=$processes: this machine has $gpus GPUs"
  fi
fi

workdir=$runs/$(basename "$file" .py)
logs=$workdir/logs
pids=()

send() {
  ((${#pids[@]} == 0)) || kill "-$1" "${pids[@]}" 2>/dev/null || true
}

# shellcheck disable=SC2329  # called by the traps
interrupted() {
  trap '' INT TERM
  send "$1"
  # A training first saves its last step.
  for ((patience = 600; patience; patience--)); do
    if ((${#pids[@]} == 0)) || ! kill -0 "${pids[@]}" 2>/dev/null; then break; fi
    sleep 0.1
  done
  exit "$2"
}

if ! "$dry_run"; then
  mkdir -p "$logs"
  # Process 0 may open it only after tail has looked for it.
  : >"$logs/process-0.log"
  # Gives every process a process group, which a Ctrl-C then reaches through the trap alone.
  set -m
  trap 'send KILL' EXIT
  trap 'interrupted INT 130' INT
  trap 'interrupted TERM 143' TERM
fi
for ((i = 0; i < processes; i++)); do
  command=(env "JAX_PLATFORMS=$device")
  [[ $device == cpu ]] || command=(env "CUDA_VISIBLE_DEVICES=$i")
  command+=("$PYTHON" -m l2s_jax.main "--config=$file" "--workdir=$workdir")
  command+=("--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$i" "$@")
  printf '%q ' "${command[@]}"
  printf '> %q\n' "$logs/process-$i.log"
  "$dry_run" && continue
  "${command[@]}" </dev/null >"$logs/process-$i.log" 2>&1 &
  pids+=($!)
done
! "$dry_run" || exit 0

tail -n +1 -f --pid="${pids[0]}" "$logs/process-0.log" &
follower=$!
status=0
patience=100
while ((${#pids[@]})); do
  sleep 0.1
  for i in "${!pids[@]}"; do
    ! kill -0 "${pids[i]}" 2>/dev/null || continue
    code=0
    { wait "${pids[i]}" || code=$?; } 2>/dev/null
    unset "pids[i]"
    if ((code)); then
      ((status)) || status=$code
      echo "process $i ended with status $code; see $logs/process-$i.log" >&2
    fi
  done
  # The others end by themselves when one does; these are for those that cannot.
  ((status == 0 || patience-- > 0)) || send KILL
done
wait "$follower" || true
exit "$status"
