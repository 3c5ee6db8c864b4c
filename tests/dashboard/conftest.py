"""One browser, a finished run and a live one, and their servers, for all tests of the page."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.scene import ANSWERS, HOSTILE, QUESTIONS, Scene

STEPS = 12


@dataclass(frozen=True)
class Server:
    """A running `attune dashboard`: its address without and with the token."""

    origin: str
    token: str
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"{self.origin}/#token={self.token}"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}


def start_server(root: Path, cache: Path, *arguments: str) -> Server:
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "dashboard", str(root), "--port", "0", *arguments],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"(http://\S+)/#token=(\S+)", line)
    assert found, f"no address was printed: {line!r}"
    return Server(found[1], found[2], process)


def stop_server(server: Server) -> None:
    server.process.terminate()
    assert server.process.wait(timeout=20) == 0, "an end that was asked for"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE as `services.text.tokenizer` makes them, without the seconds that its library takes."""
    import tokenizers

    made: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<user>", "<assistant>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*QUESTIONS, *ANSWERS] * 4, trainer)
    return made


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A directory of two runs: `done`, whose step 5 is hostile, and `other`, one step shorter."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("done", "other"):
        scene = Scene(root / name, tokenizer if name == "done" else None, seed=len(name))
        for number in range(STEPS if name == "done" else STEPS - 1):
            hostile = name == "done" and number == 5
            scene.step(HOSTILE if hostile else None, HOSTILE if hostile else None)
        scene.run.event("rollout_died", actor="rollout-0", error=f"it is gone {HOSTILE}")
        if name == "done":
            scene.run.write_bad_batch(
                7, [scene.group(7, HOSTILE, HOSTILE), scene.group(8, None, None)], f"NaN {HOSTILE}"
            )
        scene.run.event("finished", signal=None, steps=scene.steps, committed=scene.steps)
        scene.run.unlock()
    return root


@pytest.fixture(scope="session")
def server(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = start_server(finished, tmp_path_factory.mktemp("cache"))
    yield started
    stop_server(started)


@pytest.fixture(scope="module")  # Playwright runs an event loop in this thread, which others want for themselves
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "Chromium is missing: scripts/system_packages.sh chromium"
    with sync_playwright() as playwright:
        # As root, in a container, its sandbox cannot be set up.
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
