"""The network interface over which the nodes of a job meet, where the site file names none."""

import fcntl
import os
import socket
import struct

SIOCGIFADDR = 0x8915
SIOCGIFFLAGS = 0x8913
IFF_UP, IFF_LOOPBACK = 0x1, 0x8


def find_interface(hosts: list[str]) -> str:
    """Return the interface for NCCL's and gloo's sockets; empty to leave it to them."""
    return choose_interface(list_interfaces(), find_address(hosts))


def choose_interface(interfaces: dict[str, str], address: str) -> str:
    """Return InfiniBand's interface, or the one that has `address`, by which this node reaches another.

    Pure. Empty if neither exists. `interfaces` are {name: IPv4 address} of those that are up and not
    the loopback."""
    fast = sorted(name for name in interfaces if name.startswith("ib"))
    return fast[0] if fast else next((name for name, own in interfaces.items() if own == address), "")


def list_interfaces() -> dict[str, str]:
    """Return {name: IPv4 address} of this node's interfaces that are up, without the loopback."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", os.fsencode(name)[:15])
            try:
                flags = struct.unpack("16xH", fcntl.ioctl(probe, SIOCGIFFLAGS, request)[:18])[0]
                address = fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24]
            except OSError:  # without an IPv4 address
                continue
            if flags & IFF_UP and not flags & IFF_LOOPBACK:
                found[name] = socket.inet_ntoa(address)
    return found


def find_address(hosts: list[str]) -> str:
    """Return this node's address on the way to the last of `hosts`; empty if there is none."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((hosts[-1], 9))  # sends nothing
            return probe.getsockname()[0]
    except (OSError, IndexError):
        return ""
