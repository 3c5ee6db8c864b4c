"""Connections that send no request: closed after a while, so that they do not use up the file descriptors.

uvicorn closes a connection that is idle between two requests, but neither one that never sends a whole header nor one
that sends a byte now and then; and this is before anybody is asked for a key.
"""

import asyncio
from typing import Any


def with_header_deadline(protocol: type[asyncio.Protocol], header_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, by httptools or h11, which closes a connection whose next request's header is not complete
    `header_s` after it was opened, or after the header's first byte."""
    base: Any = protocol  # uvicorn's protocols have no common type

    class HeaderDeadline(base):
        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            base.connection_made(self, transport)
            self._await_header()

        def data_received(self, data: bytes) -> None:
            before = self.cycle  # of a request and its answer, made once the request's header is complete
            base.data_received(self, data)
            if self.cycle is not before:
                self._stop_waiting()
            elif before is None or before.response_complete:
                self._await_header()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            base.connection_lost(self, exc)

        def _await_header(self) -> None:
            if self._header_timer is None:
                self._header_timer = self.loop.call_later(header_s, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return HeaderDeadline
