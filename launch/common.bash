# What the scripts that run configs on this machine's files share; they source it from the root.
# shellcheck shell=bash

# find_config CALLER CONFIG: prints the file of a config, which is a path from where the caller is or
# from here, or NAME for configs/NAME.py
find_config() {
  local file=configs/$2.py
  if [[ $2 == */* || $2 == *.py ]]; then
    file=$2
    [[ $file == /* || ! -f $1/$file ]] || file=$1/$file
    [[ $file == */* || -f $file ]] || file=configs/$file
  fi
  [[ -f $file ]] || fail "no such config: $file"
  echo "${file#"$PWD"/}"
}

# The interpreter, unless the caller names one.
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
