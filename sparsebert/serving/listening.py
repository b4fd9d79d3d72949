"""The address of a server, and who may use it."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from sparsebert.config import ServeConfig
from sparsebert.errors import InputError
from sparsebert.serving.key import key_of

BACKLOG = 2048  # connections that the kernel keeps while the loop is busy


def allowed_key(config: ServeConfig) -> str | None:
    """The key that clients must send; None for none, which only this machine's own address may have, or --insecure."""
    key = key_of(config.api_key_file)
    if key is None and not config.insecure and not _is_loopback(config.host):
        raise InputError(
            f"anybody who reaches {config.host} could use the server, and there is no API key",
            fix="give --api-key-file FILE, or --insecure, or --host 127.0.0.1",
        )
    return key


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextlib.contextmanager
def listening(host: str, port: int):
    """A socket that is bound to the address; InputError if it cannot be."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise InputError(
            f"there is no address {host}: {error.strerror or error}", fix="choose another --host"
        ) from error
    with contextlib.closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise InputError(f"{host}:{port} cannot be used: {error.strerror}", fix="choose another --port") from error
        yield listener
