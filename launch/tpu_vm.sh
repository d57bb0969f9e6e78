#!/usr/bin/env bash
# Creates a Cloud TPU slice of one or more hosts, runs this repository on it, deletes it; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_vm.sh [--dry-run] create [--spot]
       launch/tpu_vm.sh [--dry-run] setup|delete
       launch/tpu_vm.sh [--dry-run] run CONFIG [FLAG...]
       launch/tpu_vm.sh [--dry-run] resume [--spot] CONFIG [FLAG...]
       launch/tpu_vm.sh [--dry-run] logs|fetch CONFIG

  create  asks for a slice (a queued resource with one node) and waits until it is there; --spot:
          one that is cheaper and may be taken away at any time
  setup   copies the commit that is checked out to all hosts, without changes that are not committed,
          and installs it with the constraints file; copies DATA, LLM and SLM too, but for the files
          that are there already
  run     starts configs/CONFIG.py on all hosts, and follows the log of the first; FLAG... as for
          l2s_jax.main; the same command again continues where it stopped
  logs    follows that log again; the exit status is that of the run
  resume  run; first delete and create if the slice has been taken away, and setup if it is not done
  fetch   copies the report of CONFIG and its predictions to runs/CONFIG
  delete  deletes the slice and all that is on its hosts

From the environment: NAME (default l2s), ZONE (us-central1-a), TYPE (v5litepod-8), IMAGE
(v2-alpha-tpuv5-lite), and BUCKET, a bucket or a folder in one, as gs://NAME or gs://NAME/FOLDER,
which the slice's service account may write. With BUCKET the workdir is BUCKET/runs/CONFIG, else
runs/CONFIG on the host's disk. A TYPE of several hosts needs it, because they share the workdir,
and so does resume.

DATA, LLM and SLM are folders on this machine: with the data of the config, and with checkpoints.
setup copies them to data/NAME and checkpoints/NAME in the bucket, or without BUCKET on the disk of
every host; NAME is the folder's own. run then sets config.task.data_dir, config.llm.path and
config.slm.path to these places. A file that is no longer here stays there.

gcloud must be installed, with a project and credentials. --dry-run prints each command and runs
none.
TEXT
}

fail() {
  echo "launch/tpu_vm.sh: $1" >&2
  exit 2
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${NAME:-l2s}
zone=${ZONE:-us-central1-a}
type=${TYPE:-v5litepod-8}
image=${IMAGE:-v2-alpha-tpuv5-lite}
bucket=${BUCKET:-}
bucket=${bucket%/}
runs=${bucket:+$bucket/}runs
vm=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)

dry_run=false
call() {
  printf '%q ' "$@"
  echo
  "$dry_run" || "$@"
}

on_hosts() {
  call "${vm[@]}" ssh "$name" "--zone=$zone" "--worker=$1" "--command=$2" "${@:3}"
}

to_hosts() {
  call "${vm[@]}" scp "$@" "--zone=$zone" --worker=all
}

# What setup copies: folders, and where they come to; what run says of them.
sources=() places=() settings=()

# bring VARIABLE SETTING PLACE: the folder that the variable names, if it names one
bring() {
  local given=${!1:-} path place i
  [[ -n $given ]] || return 0
  path=$(cd "$here" && realpath -es -- "$given" 2> /dev/null) && [[ -d $path ]] ||
    fail "$1=$given: expected a folder on this machine"
  [[ -n $(find -L "$path" -type f -print -quit) ]] ||
    fail "$1=$given: expected a folder with files"
  [[ -z $(find -L "$path" -name '*[\\[:cntrl:]]*' -print -quit) ]] ||
    fail "$1=$given: expected no backslash or control character in the names of its files"
  place=$3/$(basename -- "$path")
  settings+=("--config.$2=${bucket:+$bucket/}$place")
  for i in "${!places[@]}"; do
    [[ ${places[i]} == "$place" ]] || continue
    [[ ${sources[i]} != "$path" ]] || return 0
    fail "$1=$given: expected another name than that of ${sources[i]}"
  done
  sources+=("$path") places+=("$place")
}

# copy_to_hosts SOURCE PLACE: the files that are not the same on all hosts
copy_to_hosts() {
  local parts=$temporary/parts there=$temporary/there sums=$temporary/sums path silent whole
  whole=$parts/$(basename -- "$1")
  rm -rf "$parts" "$there"
  mkdir -p "$whole" "$there"
  "$dry_run" || (cd "$1" && find -L . -type f -exec sha256sum {} +) > "$sums"
  to_hosts "$sums" "$name:l2s_jax.sums"
  on_hosts all "mkdir -p l2s_jax/$(printf %q "$2") && cd l2s_jax/$(printf %q "$2") && {\
 sha256sum --check --quiet ~/l2s_jax.sums 2> /dev/null; echo; echo checked; }" \
    "--output-directory=$there"
  if ! "$dry_run"; then
    silent=$(grep -Lx checked "$there"/* || true)
    if [[ -n $silent ]]; then
      echo "launch/tpu_vm.sh: $2: not all hosts said what they have of it" >&2
      return 1
    fi
    while IFS= read -r path; do
      ! grep -qxF -e "$path: FAILED" -e "$path: FAILED open or read" "$there"/* || {
        mkdir -p "$whole/$(dirname -- "$path")"
        ln -s "$1/$path" "$whole/$path"  # scp copies what it points to
      }
    done < <(cut -c 67- "$sums")
    if [[ -z $(ls -A "$whole") ]]; then
      echo "$2: all hosts have it"
      return
    fi
  fi
  to_hosts --recurse "$whole" "$name:l2s_jax/$(dirname "$2")/"
}

# copy_to_bucket SOURCE PLACE: the files that are not the same there
copy_to_bucket() {
  local from=$1 path links=()
  # gcloud would leave out what is a link, such as all files of a snapshot in the hub's cache.
  if [[ -n $(find "$1" -type l -print -quit) ]]; then
    links=(--no-ignore-symlinks)
    from=$temporary/linked/$(basename -- "$1")
    while IFS= read -r path; do
      mkdir -p "$from/$(dirname -- "$path")"
      ln -sf "$1/$path" "$from/$path"
    done < <(cd "$1" && find -L . -type f)
  fi
  call gcloud storage rsync --recursive "${links[@]}" "$from" "$bucket/$2"
}

check_config() {
  [[ -n ${1:-} ]] || fail "$action needs a config; see --help"
  [[ -f configs/$1.py ]] || fail "no such config: configs/$1.py"
  [[ $action != run && $action != resume ]] || git cat-file -e "HEAD:configs/$1.py" 2> /dev/null ||
    fail "configs/$1.py is not committed; setup copies what is"
}

name_uncommitted() {
  local changes
  changes=$(git status --porcelain 2> /dev/null | cut -c 4- | paste -s -d ' ')
  [[ -z $changes ]] || echo "launch/tpu_vm.sh: not committed, and not copied: $changes" >&2
}

state() {
  "${queue[@]}" describe "$name" "--zone=$zone" "--format=value(state.state)"
}

create() {
  call "${queue[@]}" create "$name" "--node-id=$name" "--zone=$zone" \
    "--accelerator-type=$type" "--runtime-version=$image" "$@"
  ! "$dry_run" || return 0
  local now unheard=0
  until now=$(state) && [[ $now == ACTIVE ]]; do
    echo "$name: ${now:-no answer}"
    [[ $now != FAILED && $now != SUSPEND* ]] || return 1
    # The slice comes, and is paid for, whether or not a question gets an answer.
    if [[ -n $now ]]; then unheard=0; else unheard=$((unheard + 1)); fi
    ((unheard < 10)) || return 1
    sleep 30
  done
}

setup() {
  local archive i
  temporary=$(mktemp -d)
  trap 'rm -rf "$temporary"' EXIT
  archive=$temporary/l2s_jax.tar.gz
  name_uncommitted
  call git archive --format=tar.gz "--output=$archive" HEAD
  to_hosts "$archive" "$name:l2s_jax.tar.gz"
  # The images' own Python is older than 3.11, so uv brings one.
  on_hosts all "mkdir -p l2s_jax && touch l2s_jax/.setting_up \
&& tar -xzf l2s_jax.tar.gz -C l2s_jax && cd l2s_jax \
&& python3 -m pip install -q --user uv \
&& python3 -m uv venv -q --allow-existing --python 3.11 .venv \
&& python3 -m uv pip install -q --python .venv/bin/python -c constraints.txt -e '.[gs]' 'jax[tpu]'"
  for i in "${!sources[@]}"; do
    if [[ -n $bucket ]]; then
      copy_to_bucket "${sources[i]}" "${places[i]}"
    else
      copy_to_hosts "${sources[i]}" "${places[i]}"
    fi
  done
  on_hosts all "rm l2s_jax/.setting_up"
}

run() {
  local config=$1 flags="" command
  shift
  set -- "${settings[@]}" "$@"
  (($# == 0)) || flags=$(printf ' %q' "$@")
  command=".venv/bin/python -m l2s_jax.main --config=configs/$config.py --workdir=$runs/$config\
 --distributed$flags; echo \$? > logs/$config.status"
  # A run that is not tied to this connection, nor to this machine.
  on_hosts all "cd l2s_jax && mkdir -p logs\
 && { ! kill -0 \"\$(cat logs/$config.pid 2> /dev/null)\" 2> /dev/null\
 || { echo '$config is running; see logs' >&2; exit 2; }; }\
 && rm -f logs/$config.status && {\
 setsid nohup bash -c $(printf %q "$command") > logs/$config.log 2>&1 < /dev/null &\
 echo \$! > logs/$config.pid; }"
  logs "$config"
}

logs() {
  on_hosts 0 "cd l2s_jax && tail -n +1 -F --pid=\"\$(cat logs/$1.pid)\" logs/$1.log;\
 exit \"\$(cat logs/$1.status)\""
}

if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
action=${1:-}
shift || true
case $action in
  --help | -h) usage; exit ;;
  create | setup | delete | run | resume | logs | fetch) ;;
  *)
    fail "expected create, setup, run, resume, logs, fetch or delete, got '$action'; see --help"
    ;;
esac
spot=()
if [[ $action == create || $action == resume ]] && [[ ${1:-} == --spot ]]; then
  spot=(--spot)
  shift
fi
case $action in
  create | setup | delete) (($# == 0)) || fail "$action: unexpected $1; see --help" ;;
  *) check_config "${1:-}" ;;
esac
[[ $action != resume || -n $bucket ]] ||
  fail "resume needs BUCKET: the disks of a slice are gone with it; see --help"
[[ -z $bucket || $bucket =~ ^gs://[a-z0-9][a-z0-9._/-]*$ ]] ||
  fail "BUCKET=$bucket: expected gs://NAME or gs://NAME/FOLDER"
case $action in
  create | setup | run | resume)
    bring DATA task.data_dir data
    bring LLM llm.path checkpoints
    bring SLM slm.path checkpoints
    ;;
esac
"$dry_run" || command -v gcloud >/dev/null || fail "gcloud is not installed"

remove() {
  call "${queue[@]}" delete "$name" "--zone=$zone" --force --quiet
}

case $action in
  create) create "${spot[@]}" ;;
  setup) setup ;;
  run) run "$@" ;;
  resume)
    now=
    "$dry_run" || now=$(state) || true
    if [[ $now != ACTIVE ]]; then
      if "$dry_run" || [[ -n $now ]]; then remove; fi
      create "${spot[@]}"
      setup
    elif ! on_hosts all "test -d l2s_jax/.venv && ! test -f l2s_jax/.setting_up"; then
      setup
    fi
    run "$@"
    ;;
  logs) logs "$1" ;;
  fetch)
    call mkdir -p "runs/$1"
    remote=()
    for file in config.json report.json report.md quality_latency.png quality_latency.svg \
      predictions; do
      remote+=("${bucket:-$name:l2s_jax}/runs/$1/$file")
    done
    if [[ -n $bucket ]]; then
      call gcloud storage cp --recursive "${remote[@]}" "runs/$1"
    else
      call "${vm[@]}" scp --recurse "${remote[@]}" "runs/$1" "--zone=$zone"
    fi
    ;;
  delete) remove ;;
esac
