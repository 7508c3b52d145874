"""The demo's web server."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager

from ..runtime.streams import say
from .session import DemoSession


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket, closed at the end; ValueError if the address is not available."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ValueError(
            f"host and port can't be listened at: {host}, {port}: {error.strerror or error}"
        ) from None
    with listener:
        yield listener


@contextmanager
def quiet_gradio() -> Iterator[None]:
    """No telemetry, and uploads in a temporary folder that is removed at the end.

    gradio reads these variables when it is imported, so this must be entered before.
    """
    with tempfile.TemporaryDirectory(prefix="flowturbo-demo-") as folder:
        variables = {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_RUN_HISTORY": "False",
            "GRADIO_TEMP_DIR": folder,
        }
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def serve(
    session: DemoSession, listener: socket.socket, address: str, *, guidance: float, browser: bool
) -> None:
    """Answer requests until Ctrl-C.

    guidance: its value at the start. browser: whether to open the page in a browser.
    """
    import uvicorn

    from .page import application

    # Browsers keep a connection open as long as the page is, which would delay the shutdown.
    config = uvicorn.Config(
        application(session, guidance), log_level="warning", timeout_graceful_shutdown=1
    )
    try:
        say(f"flowturbo demo: {address} (Ctrl-C ends it)")
        if browser:
            threading.Timer(1, webbrowser.open, (address,)).start()
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # Ctrl-C is the regular end
    finally:
        session.close()
