"""Serving the page in the main thread: Ctrl-C ends it, and errors are seen on the terminal.

Captum's own `visualizer.serve` is for notebooks: its thread keeps a process alive for ever, and
hides errors unless it is told not to.
"""

from __future__ import annotations

import contextlib
import warnings
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from captum_generic_attn.insights.requirement import require_insights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from captum.insights import AttributionVisualizer


def serve(visualizer: AttributionVisualizer, port: int = 0) -> None:
    """Show a visualizer's page to browsers on this machine, until Ctrl-C.

    Prints the page's address, and afterwards the traceback of any error on stderr. After an error
    the page goes on turning its wheel: mend what was wrong and press Fetch again.

    Args:
        visualizer: what to show.
        port: where; 0 takes a free one.

    Raises:
        ImportError: if Captum Insights is not installed.
        OSError: if the port is taken.
    """
    require_insights()
    from captum.insights.attr_vis import server

    with (
        _shown(server, visualizer),
        make_server("127.0.0.1", port, server.app, _Server, _Handler) as http,
        warnings.catch_warnings(),
        contextlib.suppress(KeyboardInterrupt),
    ):
        # Captum warns of inputs without gradients, which no method here needs to be given.
        warnings.filterwarnings("ignore", message="It looks like that the attribution")
        print(  # noqa: T201
            f"Captum Insights: http://127.0.0.1:{http.server_port} (Ctrl-C ends it)", flush=True
        )
        http.serve_forever()


@contextlib.contextmanager
def _shown(server: Any, visualizer: AttributionVisualizer) -> Iterator[None]:
    """The page has one visualizer for the process, which is put back."""
    before = server.visualizer
    server.visualizer = visualizer
    try:
        yield
    finally:
        server.visualizer = before


class _Server(ThreadingMixIn, WSGIServer):
    """Browsers open connections ahead, which would keep others waiting."""

    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, *_args: Any) -> None:
        """Requests are not told of; errors are, by the page's own application."""
