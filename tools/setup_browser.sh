#!/bin/sh
# Finds the Chromium that tests/test_gateway_page.py drives, or installs Debian's; prints its path.
#
#   CHROMIUM  the browser to use, if it has another name
set -eu

say() { printf 'setup: %s\n' "$*" >&2; }
find_browser() {
    for name in ${CHROMIUM:-chromium chromium-browser google-chrome}; do
        if command -v "$name"; then return 0; fi
    done
    return 1
}

if find_browser; then exit 0; fi
if [ "${CHROMIUM:-}" ]; then
    say "CHROMIUM is $CHROMIUM, which is no program"
    exit 1
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing chromium for the test of the gateway's page (about 400 MB)"
    if apt-get update -q >&2 &&
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium >&2 &&
        find_browser; then exit 0; fi
fi
say "the test of the gateway's page needs Chromium; run: sudo apt-get install chromium" \
    "(or set CHROMIUM to a Chrome that is installed)"
exit 1
