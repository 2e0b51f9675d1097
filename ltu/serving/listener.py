"""Opens the sockets on which the server listens, before the model is loaded.

So a port that is in use is found in a moment. A client that connects while the model is loaded
waits for its reply.
"""

import errno
import ipaddress
import logging
import os
import socket

logger = logging.getLogger(__name__)

BACKLOG = 2048  # connections that the system holds until the server accepts them


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Listen on each address of a host.

    Args:
        host: a name or an address; "" for all addresses.
        port: 0 for a free one, the same for all addresses.

    Raises:
        OSError: the name is unknown, the port is in use or cannot be opened; with a hint.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise OSError(f"--host {host}: the name cannot be resolved ({error.strerror})") from error
    listeners: list[socket.socket] = []
    # A name such as localhost may have an address of a family that this machine does not have.
    unavailable: list[OSError] = []
    for family, _, _, _, address in dict.fromkeys(found):
        if port == 0 and listeners:
            address = (address[0], port_of(listeners[0]), *address[2:])
        try:
            listeners.append(socket.create_server(address, family=family, backlog=BACKLOG))
        except OSError as error:
            reason = _bind_error(address[0], address[1], error)
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                unavailable.append(reason)
                continue
            for listener in listeners:
                listener.close()
            raise reason from error
    if not listeners:
        raise unavailable[0]
    return listeners


def _bind_error(host: str, port: int, error: OSError) -> OSError:
    """Return an error with the address and a hint."""
    address = format_address(host, port)
    if error.errno == errno.EADDRINUSE:
        return OSError(
            f"{address} is in use by another program. Choose another port with --port (0 selects "
            "a free one)."
        )
    reason = os.strerror(error.errno)
    return OSError(f"{address} cannot be opened ({reason}). Choose others with --host and --port.")


def port_of(listener: socket.socket) -> int:
    """Return the port on which a socket listens."""
    return listener.getsockname()[1]


def format_address(host: str, port: int) -> str:
    """Return host:port, with brackets around an IPv6 address."""
    if ":" in host:
        return f"[{host}]:{port}"
    return f"{host}:{port}"


def warn_if_open(listeners: list[socket.socket], key: str) -> None:
    """Log one warning if others than this machine can reach the server and there is no key.

    Args:
        listeners: the sockets of the server.
        key: the API key; "" if there is none.
    """
    if key:
        return
    for listener in listeners:
        host, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            logger.warning(
                "WARNING: LTU_API_KEY is not set, and %s is not a loopback address: everybody who "
                "can reach this machine can use the model. Set LTU_API_KEY, or use --host "
                "127.0.0.1.",
                format_address(host, port),
            )
            return
