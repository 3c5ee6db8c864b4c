"""Writes docs/openapi/reward_server.json, the reward server's OpenAPI document; `--check` compares it."""

import argparse
import json
import sys
from pathlib import Path

from reward_server.app import create_app
from reward_server.config import RewardSection

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "openapi" / "reward_server.json"


def text() -> str:
    """The document of a server that asks for a key, as JSON."""
    app = create_app(RewardSection(), token="-")  # noqa: S106 - any: the document says that one is asked for
    return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where the file is not what would be written")
    if parser.parse_args().check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text():
            return 0
        print(f"{PAGE.relative_to(ROOT)} is not what the server says: run `make docs`", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
