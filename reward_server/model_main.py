"""What a model's process runs, and what is said between it and the server: JSON messages over a socket pair.

    server -> model   {"spec": {...}} once, then {"rows": [[ids, at, choices], ...]}, one at a time
    model -> server   {"facts": {...}}, {"outputs": [...]}, {"refused": a user's mistake}, {"failed": type and place}

Invariants: nothing but JSON crosses (design, 9). The process ends with the server, however that ends: the kernel closes
the server's end of the pair, and a thread that waits for it ends the process, whatever it computes.
"""

import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from pydantic_core import from_json, to_json

from reward_server.logs import configure, where
from reward_server.runner import ModelFacts, ModelSpec, Row, load_model
from services.errors import UserError


def write(connection: Connection, message: Mapping[str, Any]) -> None:
    """Numbers come back as they were, bit for bit, those that are not finite too. Raises OSError, EOFError."""
    connection.send_bytes(to_json(message, inf_nan_mode="constants"))


def read(connection: Connection) -> dict[str, Any]:
    """The next message. Raises OSError, EOFError."""
    return from_json(connection.recv_bytes(), allow_inf_nan=True)


def rows_message(rows: Sequence[Row]) -> dict[str, Any]:
    return {"rows": [[row.ids, row.at, row.choices] for row in rows]}


def facts_of(message: Mapping[str, Any]) -> ModelFacts:
    facts = ModelFacts(**message["facts"])
    return replace(facts, labels=tuple(facts.labels))


def main(descriptor: int) -> None:
    """Serves one model on the socket of this number until the server is gone."""
    # Ctrl-C and a service manager reach every process of the group; this one is needed until the server has drained.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    configure("warning")
    connection = Connection(descriptor)
    inbox: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    try:
        model = load_model(ModelSpec(**inbox.get()["spec"]))
    except ImportError:
        write(connection, {"refused": "a model needs torch and transformers: pip install 'attune[cpu]'"})
        return
    except UserError as error:
        write(connection, {"refused": str(error)})
        return
    except Exception as error:
        write(connection, {"failed": where(error)})
        return
    write(connection, {"facts": asdict(model.facts)})
    while True:
        rows = [Row(tuple(ids), tuple(at), tuple(choices)) for ids, at, choices in inbox.get()["rows"]]
        try:
            answer = {"outputs": model.run(rows)}
        except Exception as error:
            answer = {"failed": where(error)}
        write(connection, answer)


def _listen(connection: Connection, inbox: "SimpleQueue[dict[str, Any]]") -> None:
    while True:
        try:
            inbox.put(read(connection))
        except (EOFError, OSError):
            os._exit(0)  # the server is gone, and nobody waits for what this computes


if __name__ == "__main__":
    main(int(sys.argv[1]))
