#!/usr/bin/env python3
"""Writes deploy/schemas/ from CustomResourceDefinitions: python scripts/crd_schemas.py CRD.yaml ...

Of each, the schema of its version v1, without descriptions, as compressed JSON. deploy/schemas/README.md says which
releases were taken, and from where; newer ones are taken by running this on their files.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).resolve().parent.parent / "deploy" / "schemas"


def bare(node: Any, *, names: bool = False) -> Any:
    """A schema without descriptions; under `properties` the keys are names, and stay."""
    if isinstance(node, dict):
        return {
            key: bare(value, names=key == "properties") for key, value in node.items() if names or key != "description"
        }
    return [bare(item) for item in node] if isinstance(node, list) else node


def main(paths: list[str]) -> None:
    for path in paths:
        definition = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        spec = definition["spec"]
        (schema,) = [version["schema"]["openAPIV3Schema"] for version in spec["versions"] if version["name"] == "v1"]
        text = json.dumps(bare(schema), separators=(",", ":"), sort_keys=True)
        target = TARGET / f"{spec['group']}_{spec['names']['kind']}.json.gz"
        target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        print(f"{target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
