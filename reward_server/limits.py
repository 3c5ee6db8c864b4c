"""How large an item may be: texts in characters, responses in tokens. Checked after the bytes, before the scoring."""

from collections.abc import Callable, Iterator, Sequence

from reward_server.config import RewardSection
from reward_server.problems import Path, too_large
from reward_server.schema import AttentionRows, AttentionStatistics, Item


def check_items(items: Sequence[Item], place: Callable[[int, Path], Path], section: RewardSection) -> None:
    """Refuses with 413, naming the field, what is larger than the recipe allows."""
    if len(items) > section.max_items:
        message = f"{len(items)} items, at most {section.max_items} are allowed"
        raise too_large(place(0, ())[:1], message)
    for i, item in enumerate(items):
        for field, size, unit, most in _sizes(item, section):
            if size > most:
                raise too_large(place(i, field), f"{size} {unit}, at most {most} are allowed")


def _sizes(item: Item, section: RewardSection) -> Iterator[tuple[Path, int, str, int]]:
    """Field, size, unit and limit of all that may be long."""
    for field in ("prompt", "response", "text", "reference"):
        yield (field,), len(getattr(item, field) or ""), "characters", section.max_text_chars
    written = sum(len(message.role) + len(message.content) for message in item.messages or ())
    yield ("messages",), written, "characters", section.max_text_chars
    for field, texts in (("facts", item.facts), ("principles", item.principles)):
        for k, text in enumerate(texts or ()):
            yield (field, k), len(text), "characters", section.max_text_chars
    yield ("response_ids",), len(item.response_ids or ()), "tokens", section.max_tokens
    if isinstance(item.attention, AttentionStatistics):
        yield ("attention", "mass"), len(item.attention.mass), "tokens", section.max_tokens
    elif isinstance(item.attention, AttentionRows):
        yield ("attention", "rows"), len(item.attention.rows), "tokens", section.max_tokens
