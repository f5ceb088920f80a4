"""`make image-test` runs what is here, in a network of its own; `make test` does not."""

import fcntl
import socket
import struct

import pytest

from tools import buildah

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


@pytest.fixture(scope="session", autouse=True)
def loopback_alone() -> None:
    """Nothing but this machine's own processes can be reached from here on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Asks the kernel for a route and sends nothing.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
            return
    pytest.skip("there is a network: `make image-test` runs these tests in one of their own")


@pytest.fixture(scope="session")
def image() -> str:
    """The image that tools/image_build.py has built."""
    if not buildah.exists(buildah.IMAGE):
        pytest.skip("there is no image: `make image-test` builds it first")
    return buildah.IMAGE
