"""Runs a real Milvus for tests; without arguments, only says whether it could.

It listens on all addresses at fixed ports, so it gets a network namespace of its own, and this
program passes connections on to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
import threading

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def _enter_namespace() -> None:
    """Give this process, and those that it starts, a network of their own."""
    library = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWNET if os.geteuid() == 0 else _CLONE_NEWNET | _CLONE_NEWUSER
    if library.unshare(flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def _main(place: str, port: int, certificate: str = "", key: str = "") -> None:
    """Run the server, with TLS if there is a certificate, in a namespace.

    Connections to `port` outside of it are passed on.
    """
    with socket.create_server(("127.0.0.1", port)) as listening:
        _enter_namespace()
        # Only now, as it looks for free ports.
        from milvus import MilvusServer as Server
        from milvus import MilvusServerConfig

        server = Server(MilvusServerConfig(data_dir=place))
        server.config.set("authorization_enabled", True)
        if certificate:
            server.config.set("tls_mode", 1)
            server.config.set("server_pem_path", certificate)
            server.config.set("server_key_path", key)
        server.start()
        while True:
            outside, _ = listening.accept()
            inside = socket.create_connection(("127.0.0.1", server.listen_port))
            for pair in ((outside, inside), (inside, outside)):
                threading.Thread(target=_pass_on, args=pair, daemon=True).start()


if __name__ == "__main__":
    if sys.argv[1:]:
        _main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
    else:
        _enter_namespace()
