#!/bin/sh
# Finds the redis-server that tests of the shared replay store start, or fetches Debian's into
# .cache/redis, where it is unpacked and not installed: no root, no service. Prints its path.
#
#   REDIS_SERVER  the server to use, if it has another name
set -eu
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
here=$PWD/.cache/redis
if command -v "${REDIS_SERVER:-redis-server}"; then exit 0; fi
if [ "${REDIS_SERVER:-}" ]; then
    say "REDIS_SERVER is $REDIS_SERVER, which is no program"
    exit 1
fi
if [ -x "$here/redis-server" ]; then
    echo "$here/redis-server"
    exit 0
fi

apt() { apt-get -q -o Debug::NoLocking=true -o APT::Sandbox::User="$(id -un)" "$@" >&2; }
fetch() {
    apt "$@" install -y --download-only --no-install-recommends \
        -o Dir::Cache="$here" -o Dir::Cache::archives="$here/archives" redis-server
}
if command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
    say "fetching redis-server for the tests of the shared replay store (about 2 MB)"
    mkdir -p "$here/archives/partial" "$here/lists/partial"
    # Where the machine's own lists are absent or old, with lists of our own.
    own="-o Dir::State::lists=$here/lists -o Dir::Cache=$here"
    # shellcheck disable=SC2086 # options without spaces
    if fetch 2>/dev/null || { apt $own update && fetch $own; }; then
        for package in "$here"/archives/*.deb; do dpkg -x "$package" "$here/root"; done
        libraries=$(find "$here/root" -name 'lib*.so*' -exec dirname {} \; | sort -u | paste -sd:)
        cat >"$here/redis-server.new" <<EOF
#!/bin/sh
LD_LIBRARY_PATH=$libraries exec $here/root/usr/bin/redis-server "\$@"
EOF
        chmod +x "$here/redis-server.new"
        if "$here/redis-server.new" --version >&2; then
            mv "$here/redis-server.new" "$here/redis-server"
            echo "$here/redis-server"
            exit 0
        fi
    fi
fi
say "the tests of the shared replay store need Redis; run: sudo apt-get install redis-server" \
    "(or set REDIS_SERVER to one that is installed)"
exit 1
