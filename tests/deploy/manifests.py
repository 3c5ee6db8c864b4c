"""Finding things in what the chart renders."""

from typing import Any


def pods_of(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pod, and pod template wherever it lies, of some manifests."""
    found: list[dict[str, Any]] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            spec = node.get("spec")
            if isinstance(spec, dict) and "containers" in spec:
                found.append(node)
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(manifests)
    return found


def the(manifests: list[dict[str, Any]], kind: str, end: str = "") -> dict[str, Any]:
    """The one object of a kind whose name ends so."""
    (found,) = [one for one in manifests if one["kind"] == kind and one["metadata"]["name"].endswith(end)]
    return found
