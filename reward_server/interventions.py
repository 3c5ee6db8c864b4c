"""Interventions: principles that an operator adds while a policy is trained, against a habit that it has taken up.

SALMON (arXiv 2310.05910) prevents reward hacking so, without training the reward model again. They stand in an
append-only file of JSON lines, which the principle sources read before the predefined principles of every item. The
revision of its content is in the revision of every answer, so a score says which interventions it was made under.
"""

import asyncio
import errno
import hashlib
import json
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.requests import Request

from reward_server.keys import Allowance
from reward_server.problems import Refusal, refusal_of
from services.errors import UserError
from services.lines import ends_its_line

log = logging.getLogger(__name__)

MOST = 100
MOST_BYTES = 16 * 2**10
"""Of the body of one call."""
BODY_S = 10.0
"""Deadline for its arrival."""


class Intervention(BaseModel):
    """The body of POST /v1/interventions, and a line of the file: one principle, in words that a judge reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]


class Line(Intervention):
    added_at: float


class InterventionsAnswer(BaseModel):
    """How many there are now, whether this one was new, and the revision that answers will carry."""

    count: int
    added: bool
    revision: str


@dataclass(frozen=True)
class Interventions:
    """In the order in which they were added."""

    texts: tuple[str, ...] = ()

    @property
    def revision(self) -> str:
        """`i` with their number, and BLAKE2b-64 of the texts in hexadecimal; `i0` where there is none."""
        if not self.texts:
            return "i0"
        content = hashlib.blake2b(json.dumps(self.texts).encode(), digest_size=8).hexdigest()
        return f"i{len(self.texts)}-{content}"


class InterventionFile:
    """The file of one server. Several servers may share it: what another has added is read with the next request.

    What the file says when the server starts must be interventions. Later, what is none changes nothing: half an edit
    must not fail the requests of a run.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises UserError where the file is there and is not one of interventions."""
        self.path = Path(path)
        self._lock = threading.Lock()
        self._seen = _stamp(self.path)
        self._wrong: UserError | None = None
        self._now = Interventions(_texts(self.path))

    def read(self) -> Interventions:
        """What stands in the file now. A line without its end is still being written and does not count yet."""
        with self._lock:
            seen = _stamp(self.path)
            if seen != self._seen:
                self._seen, self._wrong = seen, None
                try:
                    self._now = Interventions(_texts(self.path))
                except UserError as error:
                    self._wrong = error
                    log.error("the interventions stay as they were: %s", error)
            return self._now

    def add(self, text: str) -> tuple[Interventions, bool]:
        """Appends one, flushed to the disk, unless it is there; and whether it was new.

        Raises ValueError above 100, UserError where the file cannot be read or written.
        """
        now = self.read()
        if self._wrong is not None:
            raise self._wrong
        if text in now.texts:
            return now, False
        if len(now.texts) >= MOST:
            raise ValueError(f"there are {MOST} interventions already")
        line = Line(text=text, added_at=time.time()).model_dump_json() + "\n"
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if not ends_its_line(self.path):  # what is appended would be a part of it
                    raise UserError(f"reward.interventions: the last line of {self.path} has no end: end or remove it")
                _append(self.path, line.encode())
            except OSError as error:
                raise UserError(f"reward.interventions: cannot write {self.path}: {error.strerror}") from error
        return self.read(), True


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes with the file's content; None where there is none to see."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _texts(path: Path) -> tuple[str, ...]:
    """What a file says; nothing where there is none. Raises UserError."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise UserError(f"reward.interventions: cannot read {path}: {error.strerror}") from error
    found: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        try:
            found[Line.model_validate_json(line).text] = None
        except ValidationError as error:
            said = error.errors(include_url=False, include_input=False)[0]["msg"]
            raise UserError(f"reward.interventions: {path}, line {number}: {said}") from None
    return tuple(found)


def _append(path: Path, line: bytes) -> None:
    """Adds a line in one write, so that lines of several servers do not mix. Raises OSError, and leaves nothing of it,
    where it cannot be written to its end: a torn line would take the next one with it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        written = os.write(descriptor, line)
        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        if written < len(line):
            if os.fstat(descriptor).st_size == end:  # no other server has written behind it
                os.ftruncate(descriptor, end - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def add_route(app: FastAPI, file: InterventionFile | None, *, authenticated: bool) -> None:
    """POST /v1/interventions. The app's gate asks for a key; the token, and keys of the role `interventions`, may add
    some. Without token and keys nobody may."""

    @app.post("/v1/interventions", response_model=InterventionsAnswer)
    async def interventions(request: Request) -> Any:  # pyright: ignore[reportUnusedFunction]
        """Adds a principle that every item is judged by from now on, before its others."""
        if not authenticated:
            raise Refusal(403, "token_needed", "interventions change scores: the server must be started with a token")
        allowance: Allowance = request.scope["state"]["allowance"]
        if allowance.role != "interventions":
            message = f"interventions change everybody's scores: the key {allowance.name} has not that role"
            raise Refusal(403, "role_needed", message)
        if file is None:
            raise Refusal(404, "no_interventions", "the recipe names no file of interventions (reward.interventions)")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    body += part
                    if len(body) > MOST_BYTES:
                        raise Refusal(413, "too_large", f"the body has more than {MOST_BYTES} bytes")
        except TimeoutError:
            raise Refusal(408, "body_timeout", f"the body did not arrive within {BODY_S:g} s") from None
        try:
            given = Intervention.model_validate_json(bytes(body))
        except ValidationError as error:
            raise refusal_of(error, bytes(body)) from None
        try:
            now, added = await asyncio.to_thread(file.add, given.text)
        except ValueError as error:
            raise Refusal(409, "too_many", str(error)) from None
        except UserError as error:
            raise Refusal(500, "not_added", str(error)) from None
        return InterventionsAnswer(count=len(now.texts), added=added, revision=now.revision)
