"""A real FUSE mount of a folder, as slow as a volume in a network is; run as a program.

`python tests/fuse.py FOLDER MOUNTPOINT LATENCY_S` serves the files of a flat folder, read-only,
until its standard input ends. Speaks just enough of the kernel's protocol (7.31) to look, open and
read; needs root and /dev/fuse. Every read waits for LATENCY_S, as many at once as are asked for.
"""

import ctypes
import errno
import os
import stat
import struct
import sys
import threading
import time
from pathlib import Path

_ROOT = 1
_MAX_READ = 128 * 1024
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR, _INTERRUPT = 25, 26, 27, 28, 29, 36
_BATCH_FORGET = 42
_KEEP_CACHE = 2
_VALID_S = 3600


class _Server:
    def __init__(self, folder: Path, device: int, latency_s: float) -> None:
        self._files = sorted(path for path in folder.iterdir() if path.is_file())
        self._open = [os.open(path, os.O_RDONLY) for path in self._files]
        self._folder, self._device, self._latency_s = folder, device, latency_s

    def run(self) -> None:
        """Answer requests, one after the other; several threads run this at once."""
        while True:
            try:
                request = os.read(self._device, 2 * _MAX_READ)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return  # unmounted
            _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
            if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            try:
                body, code = self._answer(opcode, node, request[40:]), 0
            except OSError as error:
                body, code = b"", -(error.errno or errno.EIO)
            os.write(self._device, struct.pack("<IiQ", 16 + len(body), code, unique) + body)

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes:
        if opcode == _INIT:
            _, minor, readahead, _ = struct.unpack_from("<IIII", body)
            sizes = (12, 9, _MAX_READ, 1, _MAX_READ // 4096, 0, 0)
            return struct.pack("<IIII", 7, min(minor, 31), readahead, 0) + struct.pack(
                "<HHIIHHI28x", *sizes
            )
        if opcode == _LOOKUP:
            name = body.split(b"\0")[0].decode()
            for number, path in enumerate(self._files):
                if path.name == name:
                    valid = struct.pack("<QQQQII", _ROOT + 1 + number, 0, _VALID_S, _VALID_S, 0, 0)
                    return valid + self._attributes(_ROOT + 1 + number)
            raise OSError(errno.ENOENT, "no such file")
        if opcode == _GETATTR:
            return struct.pack("<QII", _VALID_S, 0, 0) + self._attributes(node)
        if opcode in (_OPEN, _OPENDIR):
            return struct.pack("<QII", 0, _KEEP_CACHE, 0)
        if opcode == _READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            time.sleep(self._latency_s)
            return os.pread(self._open[node - _ROOT - 1], size, offset)
        if opcode == _READDIR:
            _, offset, _ = struct.unpack_from("<QQI", body)
            return b"".join(self._entries()[offset:])
        if opcode == _STATFS:
            return bytes(80)
        if opcode in (_RELEASE, _RELEASEDIR, _FLUSH):
            return b""
        raise OSError(errno.ENOSYS, "not spoken here")

    def _attributes(self, node: int) -> bytes:
        found = self._folder.stat() if node == _ROOT else self._files[node - _ROOT - 1].stat()
        kind = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o444
        times = (int(found.st_mtime),) * 3
        return struct.pack(
            "<6Q10I",
            node,
            found.st_size,
            found.st_size // 512,
            *times,
            0,
            0,
            0,
            kind,
            1,
            0,
            0,
            0,
            4096,
            0,
        )

    def _entries(self) -> list[bytes]:
        entries = []
        for number, path in enumerate(self._files):
            name = path.name.encode()
            head = struct.pack("<QQII", _ROOT + 1 + number, number + 1, len(name), 8)
            entries.append((head + name).ljust(-(-(24 + len(name)) // 8) * 8, b"\0"))
        return entries


def _main(folder: str, point: str, latency_s: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={_MAX_READ}"
    server = _Server(Path(folder), device, float(latency_s))
    if libc.mount(b"volume", point.encode(), b"fuse.test", 1, options.encode()):
        print(os.strerror(ctypes.get_errno()), flush=True)
        return 1
    for _ in range(16):
        threading.Thread(target=server.run, daemon=True).start()
    print("mounted", flush=True)
    sys.stdin.read()
    libc.umount2(point.encode(), 2)
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
