"""The `stream` section of a recipe: where the sample stream and the ledger live."""

import os
from collections.abc import Mapping
from typing import Literal, Self
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from pydantic import Field, field_validator, model_validator

from services.config_base import Section
from services.errors import UserError


class StreamSection(Section):
    url: str | None = Field(
        default=None,
        description="redis://[user@]host[:port][/db] or rediss:// for TLS; null: a server is started as a child of "
        "this run, with its data in the run directory. Never holds the password: recipes are saved and shared.",
    )
    password_env: str | None = Field(
        default=None,
        description="Name of the environment variable that holds the password of `url`; null: no password.",
    )
    ca_file: str | None = Field(
        default=None,
        description="PEM file of the authority that signed the server's certificate (rediss:// only); "
        "null: the system's.",
    )
    appendfsync: Literal["everysec", "always"] = Field(
        default="everysec",
        description="When the embedded server flushes its log to the disk. everysec may lose a second or two when the "
        "machine dies, or the process while the disk is busy; what is lost is made anew from the last commit and what "
        "the driver knows, so the slower `always` is seldom worth its price.",
    )
    restarts: int = Field(
        default=10,
        ge=0,
        description="Deaths of the embedded server within ten minutes that are made good: it is started again with its "
        "data. More are no accident.",
    )
    maxmemory_mb: int | None = Field(
        default=None,
        ge=16,
        description="Memory limit of the embedded server, MiB; null: none. Nothing is ever evicted: a full server "
        "refuses writes and the run stops, so the limit is a guard for the machine. The admission limit bounds what is "
        "in flight.",
    )
    connect_timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=600,
        description="Seconds to wait for the server at the start; it is local, or should be near.",
    )
    socket_timeout_s: float = Field(
        default=5.0, ge=1, le=120, description="Seconds until one call counts as unanswered; scripts take milliseconds."
    )
    patience_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="Seconds that a call is tried again while the server does not answer: covers a restart of the "
        "server and the loading of its log, within the minute in which a run must say why it cannot go on.",
    )

    @field_validator("url")
    @classmethod
    def _url_without_secret(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.password is not None:
            raise ValueError(
                "the url holds a password: put it into an environment variable and name that in `password_env`"
            )
        if parts.scheme not in ("redis", "rediss") or not parts.hostname:
            raise ValueError(f"{url!r} is not a redis:// or rediss:// url with a host")
        if parts.query or parts.fragment:
            raise ValueError(f"{url!r} has a query or a fragment; allowed is redis[s]://[user@]host[:port][/db]")
        _ = parts.port  # raises ValueError where it is no number
        return url

    @model_validator(mode="after")
    def _only_with_url(self) -> Self:
        if self.url is None and (self.password_env is not None or self.ca_file is not None):
            raise ValueError("`password_env` and `ca_file` are for a `url`; the embedded server makes its own password")
        if self.ca_file is not None and not (self.url or "").startswith("rediss://"):
            raise ValueError(f"`ca_file` needs a rediss:// url, got {self.url!r}")
        return self

    def resolved_url(self, environ: Mapping[str, str] = os.environ) -> str:
        """`url` with its password from the environment, for `connect`. A secret: never log it, show `address_of(url)`.

        Raises UserError where the variable is not set, ValueError where there is no `url` (start a server then).
        """
        if self.url is None:
            raise ValueError("stream.url is null: the run starts a server of its own")
        parts = urlsplit(self.url)
        netloc = parts.netloc.rpartition("@")[2]
        if self.password_env is not None:
            password = environ.get(self.password_env)
            if not password:
                raise UserError(f"stream.password_env: the environment variable {self.password_env} is not set")
            netloc = f"{parts.username or ''}:{quote(password, safe='')}@{netloc}"
        elif parts.username:
            netloc = f"{parts.username}@{netloc}"
        query = urlencode({"ssl_ca_certs": self.ca_file}) if self.ca_file else ""
        return urlunsplit((parts.scheme, netloc, parts.path, query, ""))
