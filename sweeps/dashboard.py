"""optuna-dashboard on a sweep's store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

READING = ("GET", "HEAD", "OPTIONS")

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def read_only(application: Application) -> Application:
    """Refuse every request that could change a study, with status 403.

    optuna-dashboard has no accounts: whoever reaches it can delete studies and tell results.
    """

    def filtered(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in READING:
            return application(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"this dashboard is read-only; start it with --writable to change studies\n"]

    return filtered


def make_dashboard(url: str, host: str, port: int, *, writable: bool) -> WSGIServer:
    """Bind optuna-dashboard to an address; the caller serves and closes.

    Args:
        url: the store's.
        host: address to listen on.
        port: 0 takes a free one.
        writable: whether visitors may change and delete studies.

    Raises:
        StorageError: if the store cannot be opened.
        OSError: if the address cannot be had.
    """
    from optuna_dashboard import wsgi

    from storage.engine import open_storage

    application: Application = wsgi(open_storage(url, read_only=not writable))
    if not writable:
        application = read_only(application)

    class QuietHandler(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            return

    return make_server(host, port, application, server_class=_Server, handler_class=QuietHandler)


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection: browsers keep idle ones open."""

    daemon_threads = True
    allow_reuse_address = True
