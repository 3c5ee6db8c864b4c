"""API keys: who may ask the reward server, for what, and how much at a time.

A keys file has a JSON object a line: a name, a salt, the BLAKE2b hash of the key under that salt, a role and limits.
The key itself is printed once, when it is made. It has 256 random bits: there is nothing to guess, so that a fast hash
does. A server reads the file again when it has changed: a line that is gone is a key that no longer counts.

Invariants: comparing takes the same time whether and where a key differs, and which of the file's keys it is. A server
that was started with keys never does without.
"""

import base64
import binascii
import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.errors import UserError
from services.lines import ends_its_line

log = logging.getLogger(__name__)

Role = Literal["score", "interventions"]
"""What a key may do: score; and, beside that, add interventions, which change everybody's scores."""

TOKEN_NAME = "token"  # noqa: S105 - the name under which the single token's requests are logged
PREFIX = "attune-"


class Key(BaseModel):
    """A line of the keys file. Limits null: the server's own alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    role: Role = "score"
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_items: Annotated[int, Field(ge=1)] | None = None


def hashed(secret: bytes, salt: bytes) -> bytes:
    """BLAKE2b-256 of a key under a salt of 16 bytes."""
    return hashlib.blake2b(secret, digest_size=32, salt=salt).digest()


def key_of(
    name: str,
    secret: str,
    *,
    role: Role = "score",
    requests_per_minute: int | None = None,
    max_items: int | None = None,
) -> Key:
    """The record of a key, under a random salt."""
    salt = secrets.token_bytes(16)
    return Key(
        name=name,
        salt=salt.hex(),
        hash=hashed(secret.encode(), salt).hex(),
        role=role,
        requests_per_minute=requests_per_minute,
        max_items=max_items,
    )


def make_key(
    path: Path,
    name: str,
    *,
    role: Role = "score",
    requests_per_minute: int | None = None,
    max_items: int | None = None,
) -> str:
    """Makes a key and appends its hash to the file, which only its owner reads: the key. Raises UserError."""
    if any(key.name == name for key in (read_keys(path) if path.exists() else ())):
        raise UserError(f"{path} has a key named {name!r} already: choose another name, or delete its line first")
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        key = key_of(name, secret, role=role, requests_per_minute=requests_per_minute, max_items=max_items)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{problem['loc'][0]}: {problem['msg']}, got {problem['input']!r}") from None
    try:
        path.touch(mode=0o600)
        begin = "" if ends_its_line(path) else "\n"  # somebody's editor left the last line open
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{begin}{key.model_dump_json(exclude_none=True)}\n")
    except OSError as error:
        raise UserError(f"cannot write the keys file {path}: {error.strerror}") from error
    return secret


def load_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file, at least one. Raises UserError."""
    keys = read_keys(path)
    if not keys:
        raise UserError(f"reward.keys_file: {path} has no key: make one with `attune reward-key NAME --file {path}`")
    return keys


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises UserError with file and line where one is no key, or a name is there twice."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"reward.keys_file: cannot read {path}: {error}") from error
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            key = Key.model_validate_json(line)
        except ValidationError as error:
            problem = error.errors(include_input=False)[0]
            place = ".".join(str(step) for step in problem["loc"]) or "the line"
            raise UserError(f"{path}:{number}: {place}: {problem['msg']}") from None
        if key.name in keys:
            raise UserError(f"{path}:{number}: the name {key.name!r} is there twice")
        keys[key.name] = key
    return tuple(keys.values())


class Allowance:
    """What one key has used: a bucket of requests that fills by the minute's share, and the items under way."""

    def __init__(self, key: Key | None) -> None:
        self.name = "" if key is None else key.name
        self.role: Role = "score" if key is None else key.role
        self._rate = None if key is None else key.requests_per_minute
        self.max_items = None if key is None else key.max_items
        self._left = float(self._rate or 0)
        self._at = time.monotonic()
        self._items = 0

    def take_request(self) -> int | None:
        """Takes a request: None, or the whole seconds after which there is one again."""
        if self._rate is None:
            return None
        now = time.monotonic()
        self._left = min(float(self._rate), self._left + (now - self._at) * self._rate / 60)
        self._at = now
        if self._left < 1:
            return math.ceil((1 - self._left) * 60 / self._rate)
        self._left -= 1
        return None

    @contextmanager
    def items(self, count: int) -> Generator[bool]:
        """Holds `count` items; gives False, and holds nothing, where the key has too many under way."""
        if self.max_items is not None and self._items + count > self.max_items:
            yield False
            return
        self._items += count
        try:
            yield True
        finally:
            self._items -= count


class KeyRing:
    """The keys of one server with what each has used. Without any key, everybody may ask (loopback only)."""

    def __init__(self, path: Path | None = None, token: str | None = None) -> None:
        """`path`: the keys file; what it says later counts with the next request. `token`: the single bearer token,
        without limits, beside the keys; it may add interventions. Raises UserError for a file without keys."""
        self._path = path
        self._token = () if token is None else (key_of(TOKEN_NAME, token, role="interventions"),)
        self._seen = None if path is None else _stamp(path)
        self._held: dict[Key, tuple[bytes, bytes, Allowance]] = {}
        self._hold(() if path is None else load_keys(path))
        self._anybody = Allowance(None) if path is None and token is None else None

    @property
    def asks(self) -> bool:
        """Whether a key is needed."""
        return self._anybody is None

    def holder(self, authorization: Sequence[bytes]) -> Allowance | None:
        """Whose key the Authorization headers of a request have; None where they have none that counts."""
        if self._anybody is not None:
            return self._anybody
        self._read_again()
        secret = credential(authorization[0]) if len(authorization) == 1 else b""
        found: Allowance | None = None
        for salt, digest, allowance in self._held.values():  # all of them, always: see the invariant
            if hmac.compare_digest(hashed(secret, salt), digest):
                found = allowance
        return found if secret else None

    def _read_again(self) -> None:
        if self._path is None or (stamp := _stamp(self._path)) == self._seen:
            return
        self._seen = stamp
        try:
            keys = read_keys(self._path)
        except UserError as error:
            # Half an edit must not lock everybody out, nor let a key in that was there before it.
            log.error("the keys stay as they were: %s", error)
            return
        self._hold(keys)
        log.warning("%s was read again: %d keys", self._path, len(keys))

    def _hold(self, keys: Sequence[Key]) -> None:
        """A key whose line is as it was keeps what it has used."""
        self._held = {
            key: self._held.get(key) or (bytes.fromhex(key.salt), bytes.fromhex(key.hash), Allowance(key))
            for key in (*keys, *self._token)
        }


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content, at little cost; None where it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def credential(header: bytes) -> bytes:
    """The key in an Authorization header: a bearer token, or the password of Basic. Empty where there is none."""
    scheme, _, rest = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
