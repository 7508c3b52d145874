"""The demo's web server."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager

from .session import DemoSession


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that takes connections; closed in the end. ValueError where it can't be had."""
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place[:2], family=family)
    except OSError as error:
        raise ValueError(
            f"host and port can't be listened at: {host}, {port}: {error.strerror or error}"
        ) from None
    with listener:
        yield listener


@contextmanager
def quiet_gradio() -> Iterator[None]:
    """Nothing is told to anybody, and what visitors upload lies in a folder that goes with the
    demo. Before gradio is imported.
    """
    with tempfile.TemporaryDirectory(prefix="flowturbo-demo-") as folder:
        chosen = {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_RUN_HISTORY": "False",
            "GRADIO_TEMP_DIR": folder,
        }
        before = {name: os.environ.get(name) for name in chosen}
        os.environ.update(chosen)
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
    """Answer requests until Ctrl-C. guidance: at the start. browser: whether to open the page in
    one.
    """
    import uvicorn

    from .page import application

    # Browsers keep a connection open for as long as the page is: it would hold up the end.
    config = uvicorn.Config(
        application(session, guidance), log_level="warning", timeout_graceful_shutdown=1
    )
    try:
        print(f"flowturbo demo: {address} (Ctrl-C ends it)", flush=True)
        if browser:
            threading.Timer(1, webbrowser.open, (address,)).start()
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # the way it ends
    finally:
        session.close()
