#!/bin/sh
# Finds buildah and debootstrap for `make image-test`, or installs Debian's, and tries them out.
# Ends with 1 and the reason where containers cannot be built on this machine.
set -eu

FREE_KB=20000000

say() { printf 'image-test: %s\n' "$*" >&2; }
cannot() { say "$*"; exit 1; }
found() { command -v buildah && command -v debootstrap && command -v unshare; }

[ "$(uname -s)" = Linux ] || cannot "containers need Linux, and this is $(uname -s)"
[ "$(id -u)" = 0 ] || cannot "containers are made as root here; run: sudo make image-test"
if ! found >/dev/null; then
    command -v apt-get >/dev/null || cannot "install buildah and debootstrap"
    say "installing buildah and debootstrap (about 40 MB)"
    if ! { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y \
        --no-install-recommends buildah debootstrap util-linux; } >&2 || ! found >/dev/null; then
        cannot "apt-get could not install buildah and debootstrap"
    fi
fi
# A machine that is itself a container may forbid each of these.
unshare --mount --pid --net --fork true 2>/dev/null \
    || cannot "this machine lets nobody make namespaces (a container without --privileged?)"
folder=$1
mkdir -p "$folder/tmp"
free_kb=$(df -Pk "$folder" | awk 'NR == 2 {print $4}')
[ "$free_kb" -ge "$FREE_KB" ] || [ -e "$folder/storage" ] \
    || cannot "a build needs 20 GB in $folder, and $((free_kb / 1000000)) are free"
try() {
    TMPDIR="$folder/tmp" STORAGE_DRIVER="${STORAGE_DRIVER:-overlay}" \
        buildah --root "$folder/storage" --runroot "$folder/run" "$@"
}
if ! { container=$(try from scratch) && try mount "$container"; } >/dev/null; then
    cannot "buildah cannot mount its layers here, see above (STORAGE_DRIVER=vfs needs no mounts, but 30 GB)"
fi
try rm "$container" >/dev/null
