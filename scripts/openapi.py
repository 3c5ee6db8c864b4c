"""Writes docs/openapi/reward_server.json, the reward server's OpenAPI document; `--check` compares it."""

import json
import sys

from written import ROOT, write_or_check

from reward_server.app import create_app
from reward_server.config import RewardSection

PAGE = ROOT / "docs" / "openapi" / "reward_server.json"


def text() -> str:
    """The document of a server that asks for a key, as JSON."""
    app = create_app(RewardSection(), token="-")  # noqa: S106 - any: the document says that one is asked for
    return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: text()}, __doc__))
