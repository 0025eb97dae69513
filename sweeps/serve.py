"""`sweep serve`: other machines reach the store through this process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import optuna

from storage.urls import require_grpc
from sweeps.errors import SweepError
from sweeps.studies import shown_url

LOOPBACK = ("127.0.0.1", "::1", "localhost")

_POLL_SECONDS = 0.2


def run_server(storage_url: str, host: str, port: int, say: Callable[[str], None]) -> int:
    """Serve a store until SIGINT or SIGTERM; running calls are finished.

    Args:
        storage_url: a database's.
        host: address to listen on.
        port: 0 takes a free one.
        say: receives what to tell the user, line by line.

    Returns:
        The exit status: 130 after SIGINT, 0 after SIGTERM. A second signal ends the process at
        once.

    Raises:
        StorageError: if the store cannot be opened.
        SweepError: if the address cannot be had.
    """
    require_grpc("sweep serve")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    from storage.serve import StoreServer

    received: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if received:
            os._exit(130)
        received.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        server = StoreServer(storage_url, host, port)
    except OSError as error:
        raise SweepError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port, "
            "or an address of this machine for --host"
        ) from None
    server.start()
    shown = f"[{host}]" if ":" in host else host
    say(f"serving {shown_url(storage_url)} on grpc://{shown}:{server.port}; Ctrl-C ends it")
    if host in LOOPBACK:
        say("neither encrypted nor authenticated, so only this machine reaches it; from another:")
    else:
        say(
            f"neither encrypted nor authenticated: whoever reaches {shown}:{server.port} can read, "
            "change and delete every study; on a network that others use, leave --host out and use:"
        )
    say(f"  ssh -N -L {server.port}:localhost:{server.port} {os.uname().nodename}")
    say(f"  sweep worker NAME --storage grpc://localhost:{server.port}")
    while not received:
        time.sleep(_POLL_SECONDS)
    say("stopping; workers wait for the next sweep serve")
    server.stop()
    return 130 if signal.SIGINT in received else 0
