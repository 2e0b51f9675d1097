"""Limits the connections of the server, and the time and memory in which a request may arrive.

uvicorn has no limit on the time in which a request arrives, and its limit on connections answers
503 also to `/health`. Here a new connection is always accepted. If there are too many, in total or
of one client, the one that has waited longest without a complete request is closed at once; in
total, the longest of the client that has most of those that wait. So clients that send nothing, or
send slowly, keep nobody out, wherever they come from. A connection whose complete request is being
answered is never closed for another one; the number of such requests has a limit of its own
(`--max_queue`).

A client is the peer's address. Headers such as X-Forwarded-For, which anybody can write, are not
used: behind a reverse proxy all clients are one.
"""

import argparse
import asyncio
import ipaddress
import logging
import resource
from collections import Counter
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ltu.serving.batch_scheduler import Metrics

logger = logging.getLogger(__name__)

# Open files of the process that are not connections.
OWN_FILES = 32
# Connections that the event loop accepts in one turn: few if there are few files, else so many that
# a crowd does not take many turns, of which each may wait for other threads.
MIN_ACCEPTED_AT_ONCE = 8
MAX_ACCEPTED_AT_ONCE = 128
# Turns of the event loop from the moment in which a connection is accepted to that in which another
# one is closed for it.
TURNS_TO_CLOSE = 4
# Connections that remain for `/health` and requests on their way if `--max_queue` requests are in
# progress.
RESERVED_CONNECTIONS = 16
# Clients with at most as many connections that wait are alike if one must be closed.
FEW_CONNECTIONS = 8
# Bodies of the largest size that may be in arrival, in memory, for each one that may be complete.
# One client gets half of them.
ARRIVING_FRACTION = 0.5
KEEP_ALIVE_SECONDS = 10  # that a connection may be idle after a reply; clients of OpenAI wait 5
IPV6_PREFIX = 64  # bits; a client of IPv6 usually has that whole network


@dataclass(frozen=True)
class ConnectionLimits:
    """The limits of all connections.

    Args:
        total: the largest number of connections.
        per_client: the largest number of connections of a client; 0 for no limit.
        arriving_bytes: the largest number of bytes of bodies that have not arrived completely.
        receive_seconds: seconds in which the first byte of a request must arrive, in which the
            whole request must arrive after that, and in which a client must read what it is sent.
        accepted_at_once: connections that the event loop accepts in one turn.
    """

    total: int
    per_client: int
    arriving_bytes: float
    receive_seconds: float
    accepted_at_once: int


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one, where the system allows it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        logger.info("The limit of open files cannot be raised.")


def _file_limit() -> int | None:
    """Return how many files the process may have open, None if there is no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else limit


def limits_of_flags(args: argparse.Namespace) -> ConnectionLimits:
    """Return the limits by the flags of `ltu.serve` and by the limit of open files.

    Raises:
        ValueError: there are fewer connections than requests that may be in progress.
    """
    total = args.max_connections
    source = "--max_connections"
    file_limit = _file_limit()
    accepted_at_once = MAX_ACCEPTED_AT_ONCE
    if file_limit is not None:
        most = file_limit - OWN_FILES - TURNS_TO_CLOSE * MIN_ACCEPTED_AT_ONCE
        if most < total:
            total = most
            source = f"the limit of {file_limit} open files (`ulimit -n`)"
        accepted_at_once = min(
            (file_limit - OWN_FILES - total) // TURNS_TO_CLOSE, MAX_ACCEPTED_AT_ONCE
        )
    needed = args.max_queue + RESERVED_CONNECTIONS
    if total < needed:
        raise ValueError(
            f"{source} allows {max(total, 0)} connections, and --max_queue {args.max_queue} needs "
            f"{needed}. Raise the first or lower the second."
        )
    return ConnectionLimits(
        total=total,
        per_client=args.max_connections_per_client,
        arriving_bytes=ARRIVING_FRACTION * args.max_queue * args.max_body_mb * 2**20,
        receive_seconds=args.receive_seconds,
        accepted_at_once=accepted_at_once,
    )


def client_of(address: str) -> str:
    """Return the client of a peer's address: an IPv4 address or an IPv6 network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    if ip.version == 6:
        return str(ipaddress.ip_network((ip, IPV6_PREFIX), strict=False))
    return str(ip)


class OpenConnections:
    """The connections of a server, within their limits.

    Args:
        limits: the limits.
        metrics: counts the connections, and those that are closed here, by the reason.
    """

    def __init__(self, limits: ConnectionLimits, metrics: Metrics):
        self.limits = limits
        self.closed = metrics.closed_connections
        # Ordered by the time since which they wait for a request.
        self.connections: dict[LimitedConnection, None] = {}
        self.num_connections: Counter[str] = Counter()  # of each client
        self.arriving_bytes: Counter[str] = Counter()  # of each client
        metrics.connections.set_function(lambda: len(self.connections))
        metrics.arriving_bytes.set_function(lambda: self.arriving_bytes.total())

    def add(self, connection: "LimitedConnection") -> None:
        """Add a connection; close another one if there are too many."""
        client = connection.peer
        self.connections[connection] = None
        _add_to(self.num_connections, client, 1)
        if 0 < self.limits.per_client < self.num_connections[client]:
            self._close_oldest(self._waiting_connections(client))
        elif len(self.connections) > self.limits.total:
            waiting = self._waiting_connections()
            num_waiting = Counter(other.peer for other in waiting)
            most = max(num_waiting.values())
            if most > FEW_CONNECTIONS:
                waiting = [other for other in waiting if num_waiting[other.peer] == most]
            self._close_oldest(waiting)

    def remove(self, connection: "LimitedConnection") -> None:
        """Forget a connection that is closed or about to be; nothing if it was forgotten before."""
        if connection not in self.connections:
            return
        self.set_arriving(connection, 0)
        del self.connections[connection]
        _add_to(self.num_connections, connection.peer, -1)

    def wait_from_now(self, connection: "LimitedConnection") -> None:
        """Move a connection to the end of those that wait for a request."""
        if connection in self.connections:
            del self.connections[connection]
            self.connections[connection] = None

    def set_arriving(self, connection: "LimitedConnection", num_bytes: int) -> None:
        """Note how much of a body has arrived; close the oldest one if it is too much in total.

        Args:
            connection: the connection of the body.
            num_bytes: of an incomplete body; 0 if there is none.
        """
        client = connection.peer
        _add_to(self.arriving_bytes, client, num_bytes - connection.arriving_bytes)
        connection.arriving_bytes = num_bytes
        largest = self.limits.arriving_bytes
        if self.limits.per_client and self.arriving_bytes[client] > largest / 2:
            self._close_oldest(self._arriving_connections(client))
        elif self.arriving_bytes.total() > largest:
            self._close_oldest(self._arriving_connections())

    def close(self, connection: "LimitedConnection", reason: str) -> None:
        """Close a connection at once, without waiting until the client has read what was sent."""
        self.closed.labels(reason).inc()
        self.remove(connection)
        connection.transport.abort()

    def _waiting_connections(self, client: str | None = None) -> list["LimitedConnection"]:
        """Return the connections without a complete request, of one client or all; oldest first."""
        return [
            connection
            for connection in self.connections
            if client in (None, connection.peer) and not connection.is_answering()
        ]

    def _arriving_connections(self, client: str | None = None) -> list["LimitedConnection"]:
        """Return those of the waiting connections that have received a part of a body."""
        waiting = self._waiting_connections(client)
        return [connection for connection in waiting if connection.arriving_bytes]

    def _close_oldest(self, connections: list["LimitedConnection"]) -> None:
        """Close the first one. There is one, because that which is new or receives waits too."""
        self.close(connections[0], "too_many")


def _add_to(counts: Counter[str], client: str, count: int) -> None:
    """Add to the count of a client; leave no zeros, because there is no limit on addresses."""
    counts[client] += count
    if not counts[client]:
        del counts[client]


class LimitedConnection(H11Protocol):
    """A connection of uvicorn's HTTP server, within the limits.

    The state of a request's scope has `client`, see `client_of`, and `receive_deadline`, the time
    of the event loop at which the body must have arrived. The app sees to the latter, so that it
    can reply.

    Args:
        open_connections: all connections of the server.
        settings: as of uvicorn's class.
    """

    def __init__(self, *, open_connections: OpenConnections, **settings: Any):
        super().__init__(**settings)
        self.open_connections = open_connections
        self.receive_seconds = open_connections.limits.receive_seconds
        self.peer = ""
        self.arriving_bytes = 0
        self.is_silent = True  # No byte of the next request has arrived.
        self.receive_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if self.client is not None:  # None if the peer has left already.
            self.peer = client_of(self.client[0])
        self._wait_for_request()
        self.open_connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timers()
        self.open_connections.remove(self)
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self.is_silent:
            self.is_silent = False
            self._start_receive_timer()
        super().data_received(data)
        num_bytes = 0
        # After a reply, as to a body that is too large, what still arrives is thrown away.
        if self.conn.their_state is h11.SEND_BODY and not self.cycle.response_complete:
            num_bytes = self.arriving_bytes + len(data)
        if self in self.open_connections.connections:
            self.open_connections.set_arriving(self, num_bytes)

    def on_response_complete(self) -> None:
        self._wait_for_request()
        self.open_connections.wait_from_now(self)
        # This starts the next request, if the client has sent it already.
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_timer = self.loop.call_later(
            self.receive_seconds, self.open_connections.close, self, "not_read"
        )

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.write_timer is not None:
            self.write_timer.cancel()

    def is_answering(self) -> bool:
        """Return whether a complete request has no complete reply yet."""
        has_request = self.cycle is not None and not self.cycle.response_complete
        return has_request and self.conn.their_state is not h11.SEND_BODY

    def _wait_for_request(self) -> None:
        self.is_silent = True
        self._start_receive_timer()

    def _start_receive_timer(self) -> None:
        if self.receive_timer is not None:
            self.receive_timer.cancel()
        deadline = self.loop.time() + self.receive_seconds
        self.receive_timer = self.loop.call_at(deadline, self._end_receiving)
        self.app_state = self.app_state | {"client": self.peer, "receive_deadline": deadline}

    def _end_receiving(self) -> None:
        """Close the connection, unless the app has received a request and not replied to it."""
        if self.cycle is None or self.cycle.response_complete:
            self.open_connections.close(self, "not_received")

    def _stop_timers(self) -> None:
        for timer in (self.receive_timer, self.write_timer):
            if timer is not None:
                timer.cancel()
