#!/bin/sh
# Makes the environments of the clients in tests/conformance/scripts; one whose pins are unchanged stays.
#
#   tools/setup_clients.sh [NAME...]
#
# .clients/NAME has what requirements/clients-NAME.txt lists; openai_node has Node there, and
# the SDK beside the script. Uses the Python and the uv of .venv, so `make setup` comes first.
set -eu
cd "$(dirname "$0")/.."

PYTHON=.venv/bin/python
NODE=tests/conformance/scripts

say() { printf 'clients: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# uv reads none of pip's settings.
if [ "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="$PIP_INDEX_URL"; fi
if [ -z "${UV_CACHE_DIR:-}" ] && [ -d .cache/uv ]; then export UV_CACHE_DIR="$PWD/.cache/uv"; fi

[ $# -gt 0 ] || set -- $(ls requirements/clients-*.txt | sed 's/.*clients-\(.*\)\.txt/\1/')
version=$("$PYTHON" --version) || die "there is no .venv; run: make setup"
for name; do
    venv=.clients/$name
    pins=requirements/clients-$name.txt
    [ -f "$pins" ] || die "there is no $pins"
    wanted="$version $(cat "$pins" "$NODE/package.json" | sha256sum)"
    if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c ''; then
        continue
    fi
    say "installing $(sed -n '/==/{p;q;}' "$pins") into $venv"
    rm -rf "$venv"
    "$PYTHON" -m uv venv --quiet --python "$PYTHON" "$venv"
    "$PYTHON" -m uv pip install --quiet --python "$venv/bin/python" -r "$pins" \
        || die "the installation failed, see above"
    if [ "$name" = openai_node ]; then
        say "installing openai-node into $NODE/node_modules"
        # No lock file: it would name the registry that it was made with.
        PATH="$PWD/$venv/bin:$PATH" npm install --prefix "$NODE" --no-package-lock \
            --ignore-scripts --no-audit --no-fund --loglevel=error >&2 \
            || die "npm could not install openai-node, see above"
    fi
    printf '%s\n' "$wanted" >"$venv/.installed"
done
