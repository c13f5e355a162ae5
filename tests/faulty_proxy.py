"""A TCP proxy in front of the S3 server that fails when it is told to, for tests of what happens then."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator

_CUT = 5000  # bytes after which a connection is cut: in the middle of an upload
_ANSWER = (
    "HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
)
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message><RequestId>1</RequestId></Error>"


def _answer(status: str, code: str, message: str) -> bytes:
    body = _ERROR.format(code=code, message=message)
    return _ANSWER.format(status=status, length=len(body), body=body).encode()


ANSWERS = {
    "503": _answer("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "expired": _answer("400 Bad Request", "ExpiredToken", "The provided token has expired."),
}


class FaultyProxy(socketserver.ThreadingTCPServer):
    """Passes connections on to a server.

    Attributes:
        fault: What happens to requests from now on: "" for none; "503" and "expired" are answers instead of the server's;
            "cut" breaks the connection in the middle of an upload; "silent" never answers.
        faults: How many requests have failed.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        host, _, port = server.rpartition(":")
        self.server = (host, int(port))
        self.fault, self.faults = "", 0
        self.ended = threading.Event()

    @property
    def endpoint(self) -> str:
        """HOST:PORT to connect to."""
        return "{}:{}".format(*self.server_address)


class _Connection(socketserver.BaseRequestHandler):
    server: FaultyProxy

    def handle(self) -> None:
        with socket.create_connection(self.server.server) as there, contextlib.suppress(OSError):
            threading.Thread(target=self._back, args=(there,), daemon=True).start()
            passed = 0
            while data := self.request.recv(4096):
                fault = self.server.fault
                if fault and (fault != "cut" or (passed := passed + len(data)) > _CUT):
                    self._fail(fault)
                    return
                there.sendall(data)

    def _fail(self, fault: str) -> None:
        self.server.faults += 1
        if fault in ANSWERS:
            self.request.sendall(ANSWERS[fault])
            self.request.shutdown(socket.SHUT_WR)
            self.request.settimeout(1)
            with contextlib.suppress(OSError):
                while self.request.recv(65536):  # so that the answer arrives before the connection is reset
                    pass
        elif fault == "silent":
            self.server.ended.wait(60)
        else:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
            self.request.close()

    def _back(self, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := there.recv(65536):
                self.request.sendall(data)


@contextlib.contextmanager
def faulty_proxy(server: str) -> Iterator[FaultyProxy]:
    """A proxy while the block runs."""
    with FaultyProxy(server) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.fault = ""
            proxy.ended.set()
            proxy.shutdown()
