"""Apps and items for the tests of the reward server."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reward_server.app import create_app
from reward_server.config import RewardSection

TOKEN = "correct horse"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def client() -> Iterator[TestClient]:
    """The default recipe, behind a token that the client sends."""
    with TestClient(create_app(RewardSection(), token=TOKEN), headers=HEADERS, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def serving() -> Iterator[Callable[..., TestClient]]:
    """Starts a client of the app of a recipe's `reward` section, given as plain values."""
    clients: list[TestClient] = []

    def serve(scorers: Any = None, **section: Any) -> TestClient:
        app = create_app(RewardSection.model_validate(section), token=TOKEN, scorers=scorers)
        client = TestClient(app, headers=HEADERS, raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client

    yield serve
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def item() -> dict[str, Any]:
    """An item with statistics of two tokens that every source of the recipe can score."""
    return {
        "id": "a",
        "prompt": "the sky is",
        "response": "blue blue",
        "response_ids": [5, 6, 2],
        "eos_ids": [2],
        "reference": "Blue blue!",
        "attention": {
            "mass": [0.5, 0.6, 0.4],
            "salient_mass": [0.2, 0.3, 0.1],
            "neg_entropy_sum": [-0.9, -0.8, -0.7],
            "peak": [0.2, 0.3, 0.2],
            "salient_count": 2,
            "content_count": 4,
            "flags": [],
        },
    }
