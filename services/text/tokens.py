"""What rendering and training ask of a Hugging Face tokenizer beside its call: special ids, and a response's ids."""

from typing import Any

from services.errors import UserError


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that stand for no text: the named special tokens, and added ones that are marked special."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def encode_response(tokenizer: Any, text: str, *, finished: bool = True) -> tuple[int, ...]:
    """Ids of a response as the policy emits it: no token before it, and the end-of-sequence token after it if
    `finished`.

    The ids with which fine-tuning teaches the policy how a response begins and ends.
    """
    ids = tuple(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])
    if not finished:
        return ids
    if tokenizer.eos_token_id is None:
        raise UserError("policy.tokenizer: has no end-of-sequence token, so a response could never end")
    return (*ids, int(tokenizer.eos_token_id))
