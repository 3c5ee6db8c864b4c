"""A request that no engine can serve, and the checks that both engines make before they try."""

from collections.abc import Sequence

from rollout.engine import Family, KeySets
from services.errors import UserError


class RequestRefused(UserError, ValueError):  # noqa: N818 - reads as what happened where it is raised
    """What was asked of an engine is out of bounds; the message names the value and the bound. The data's fault."""


def check_fits(family: Family, max_context: int | None, prompt_ids: Sequence[int], tokens: int) -> None:
    """Raises RequestRefused for an empty prompt, or more tokens, the response's included, than positions."""
    if not prompt_ids:
        raise RequestRefused("a prompt has at least one token")
    if max_context is None:
        return
    if family == "decoder" and len(prompt_ids) + tokens > max_context:
        raise RequestRefused(
            f"a prompt of {len(prompt_ids)} tokens and a response of {tokens} exceed the context of {max_context}"
        )
    if max(len(prompt_ids), tokens) > max_context:
        raise RequestRefused(
            f"a prompt of {len(prompt_ids)} tokens or a response of {tokens} exceeds its side's {max_context} positions"
        )


def check_keys(keys: KeySets, length: int) -> None:
    """Raises RequestRefused for positions outside a prompt of `length` tokens, or weights that are not one each."""
    for name, positions in (("content", keys.content), ("salient", keys.salient)):
        if any(not 0 <= position < length for position in positions):
            raise RequestRefused(f"{name} positions are in 0 .. {length - 1}, got {min(positions)} .. {max(positions)}")
    if len(keys.salient) != len(keys.salient_weights):
        raise RequestRefused(f"{len(keys.salient)} salient positions have {len(keys.salient_weights)} weights")
