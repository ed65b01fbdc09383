"""Servers for tests: whatever an endpoint may answer, on a port of its own."""

import threading
import time
from contextlib import contextmanager


@contextmanager
def serving(routes):
    """Serves Starlette routes; gives the address."""
    import uvicorn
    from starlette.applications import Starlette

    config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
