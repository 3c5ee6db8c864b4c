"""Addresses and secrets, a Redis that is gone or too old, and records as bytes."""

import math
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis
from pydantic import ValidationError

from services.errors import UserError
from services.records import Group, Lease, PolicyVersion, Prompt
from services.stream.codec import decode_group, decode_prompt, encode_group, encode_prompt
from services.stream.config import StreamSection
from services.stream.connect import address_of, connect
from services.stream.embedded import EmbeddedRedis, redis_executable
from services.stream.errors import CodecError, StreamUnavailable


def test_redis_gone_before_the_start_is_said_with_its_address_and_no_secret() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(StreamUnavailable, match=rf"Redis at 127\.0\.0\.1:{port} cannot be used") as gone:
        connect(f"redis://:secret-word@127.0.0.1:{port}/0", 0.5)
    assert time.monotonic() - began < 3
    assert "secret-word" not in str(gone.value)
    assert isinstance(gone.value, UserError)


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(StreamUnavailable, match=r"Redis at no-such-host\.invalid:6379"):
        connect("redis://no-such-host.invalid", 0.3)


class OldRedis(socketserver.StreamRequestHandler):
    """Answers as a Redis does, to say that it is version 6.0."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                self.rfile.readline()
                words.append(self.rfile.readline().strip())
            text = b"redis_version:6.0.16\r\n"
            info = b"$%d\r\n%s\r\n" % (len(text), text)
            self.wfile.write(info if words[0].upper() == b"INFO" else b"+OK\r\n")


@pytest.fixture
def old_redis() -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), OldRedis) as old:
        old.daemon_threads = True
        thread = threading.Thread(target=old.serve_forever, args=(0.02,))
        thread.start()
        yield old.server_address[1]
        old.shutdown()
        thread.join()


def test_a_redis_that_is_too_old_is_refused(old_redis: int) -> None:
    with pytest.raises(StreamUnavailable, match=r"version 6\.0\.16; 6\.2 or later"):
        connect(f"redis://127.0.0.1:{old_redis}", 2)


def test_a_node_of_a_redis_cluster_is_refused(tmp_path: Path) -> None:
    """It would let us in, and then send every other key of the ledger elsewhere."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1] - 10_000  # nodes talk to each other on the port that is as much higher
    command = [str(redis_executable()), "--port", str(port), "--cluster-enabled", "yes"]
    with subprocess.Popen([*command, "--save", ""], cwd=tmp_path, stdout=subprocess.DEVNULL) as node:
        try:
            with pytest.raises(StreamUnavailable, match="is a node of a Redis Cluster"):
                connect(f"redis://127.0.0.1:{port}", 10)
        finally:
            node.kill()


def test_a_redis_that_evicts_is_warned_of(
    server: EmbeddedRedis, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        connect(server.url).close()
        assert "noeviction" in caplog.text
        assert server.url not in caplog.text
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "0")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"url": "redis://:word@host"}, "password"),
        ({"url": "http://host"}, "redis://"),
        ({"url": "redis://"}, "host"),
        ({"url": "redis://host:port"}, "[Pp]ort"),
        ({"url": "redis://host?ssl_cert_reqs=none"}, "query"),
        ({"password_env": "X"}, "url"),
        ({"url": "redis://host", "ca_file": "/ca.pem"}, "rediss"),
        ({"appendfsync": "no"}, "always"),
        ({"nonsense": 1}, "[Ee]xtra"),
    ],
)
def test_a_section_that_cannot_be(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        StreamSection(**wrong)


def test_the_password_comes_from_the_environment() -> None:
    section = StreamSection(url="rediss://me@host:7000/2", password_env="REDIS_WORD", ca_file="/etc/ca.pem")
    with pytest.raises(UserError, match="REDIS_WORD is not set"):
        section.resolved_url({})
    url = section.resolved_url({"REDIS_WORD": "a/b@c:d"})
    assert url == "rediss://me:a%2Fb%40c%3Ad@host:7000/2?ssl_ca_certs=%2Fetc%2Fca.pem"
    assert address_of(url) == "host:7000"
    options = redis.Redis.from_url(url).connection_pool.connection_kwargs
    assert (options["username"], options["password"], options["db"]) == ("me", "a/b@c:d", 2)
    assert options["ssl_ca_certs"] == "/etc/ca.pem"
    assert StreamSection(url="redis://host").resolved_url({}) == "redis://host"


def group(desk_type: Any, **changes: Any) -> Group:
    lease = Lease(group_id="0:p", attempt=1, epoch=0, order=0, prompt=Prompt(prompt_id="p", source="s", text="é\x00"))
    return desk_type.group_of(lease, PolicyVersion(1, 2)).model_copy(update=changes)


def test_records_survive_bit_for_bit(new_desk: Any) -> None:
    values = (0.1, 5e-324, 1.7976931348623157e308, -0.0, math.inf, 1 / 3)
    made = group(new_desk)
    sample = made.samples[0].model_copy(update={"logprobs": values, "kept_ids": ((1, 2), ()), "flags": ("f",)})
    made = made.model_copy(update={"samples": (sample,)})
    back = decode_group(encode_group(made))
    assert back == made
    assert [value.hex() for value in back.samples[0].logprobs] == [value.hex() for value in values]
    assert isinstance(back.version, PolicyVersion)
    nan = decode_group(
        encode_group(made.model_copy(update={"samples": (sample.model_copy(update={"logprobs": (math.nan,)}),)}))
    )
    assert math.isnan(nan.samples[0].logprobs[0])
    assert decode_prompt(encode_prompt(made.prompt)) == made.prompt


def test_bytes_that_are_no_record_are_refused(new_desk: Any) -> None:
    good = encode_group(group(new_desk))
    plain = msgpack.unpackb(good)
    for bad in (
        b"",
        b"\xc1",
        good[:-3],
        good + b"\x00",
        b"\x80\x04\x95\x00",  # a pickle
        encode_prompt(group(new_desk).prompt),
        msgpack.packb([1, 2]),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(plain | {"more": 1}),
        msgpack.packb(plain | {"attempt": "many"}),
    ):
        with pytest.raises(CodecError):
            decode_group(bad)
    with pytest.raises(CodecError, match="schema_version"):
        decode_group(msgpack.packb(plain | {"schema_version": 2}))
