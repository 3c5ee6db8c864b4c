"""A prompt as the policy sees it: text, token ids, and exactly where the user's words stand in it.

Chat templates are programs, so the place of a message in their output is found by rendering twice: once with the
messages and once with marks in place of the users' contents. What lies between the marks is the template's own
text, and the first rendering must be that text with the contents (trimmed, where the template trims) put in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from re import split as split_by
from typing import Any

from services.errors import UserError
from services.records import Prompt
from services.text.config import DataSection
from services.text.tokens import special_ids

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """P tokens. `offsets` are character spans in `text` (None: the tokenizer has none); `special` [P] marks tokens that
    stand for no text. `user_spans` are the contents of all user messages in `text`, `last_user_spans` those of the last
    one (several where a template repeats it)."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[Span, ...] | None
    special: tuple[bool, ...]
    user_spans: tuple[Span, ...]
    last_user_spans: tuple[Span, ...]
    templated: bool
    truncated: bool = False


class Renderer:
    """Renders prompts for one tokenizer and one data section. Cheap to make; holds no state."""

    def __init__(self, tokenizer: Any, section: DataSection, max_prompt_tokens: int | None = None) -> None:
        """`max_prompt_tokens`: what the context leaves; the section's own limit counts where it is lower."""
        limits = [limit for limit in (section.max_prompt_tokens, max_prompt_tokens) if limit is not None]
        self.limit = min(limits) if limits else None
        if self.limit is not None and self.limit < 1:
            raise UserError(f"rollout.max_tokens: leaves {self.limit} tokens of the context for the prompt")
        self.tokenizer = tokenizer
        self.section = section
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if section.template == "chat" and not has_template:
            raise UserError(
                "data.template: chat, but the tokenizer has no chat template: use none or a text with {prompt}"
            )
        self.templated = section.template == "chat" or (section.template == "auto" and has_template)
        if section.system is not None and not self.templated:
            raise UserError("data.system: needs a chat template, and prompts are rendered as plain text")
        self._special = special_ids(tokenizer)

    def render(self, prompt: Prompt) -> Rendered:
        """Raises UserError, naming the prompt, where it is too long or its template cannot be followed."""
        messages = self._messages(prompt)
        rendered = self._render(messages, prompt.prompt_id, truncated=False)
        if self.limit is None or len(rendered.ids) <= self.limit:
            return rendered
        if self.section.too_long == "fail":
            raise UserError(
                f"prompt {prompt.prompt_id} of {prompt.source} has {len(rendered.ids)} tokens, allowed are "
                f"{self.limit}: "
                "shorten it, set data.too_long: truncate, or leave more of the context (rollout.max_tokens, "
                "rollout.vllm.max_context)"
            )
        return self._truncate(messages, rendered, prompt)

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        if prompt.messages is None:
            assert prompt.text is not None
            messages = [{"role": "user", "content": prompt.text}]
        else:
            messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        if not self.templated and len(messages) > 1:
            raise UserError(
                f"prompt {prompt.prompt_id} of {prompt.source} has {len(messages)} messages, and there is no "
                f"chat template to "
                "render them with (data.template)"
            )
        if self.section.system is not None and all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system", "content": self.section.system})
        return messages

    def _render(self, messages: Sequence[dict[str, str]], prompt_id: str, *, truncated: bool) -> Rendered:
        if self.templated:
            text = self._apply(messages)
            spans = self._locate(messages, text, prompt_id)
        else:
            before, after = self.section.template.split("{prompt}") if "{prompt}" in self.section.template else ("", "")
            content = messages[-1]["content"]
            text = before + content + after
            spans = [(0, (len(before), len(before) + len(content)))]
        encoding = self.tokenizer(
            text,
            # A chat template writes its own special tokens; plain text gets those the model was trained with.
            add_special_tokens=not self.templated,
            return_offsets_mapping=bool(self.tokenizer.is_fast),
            return_attention_mask=False,
        )
        ids = tuple(int(i) for i in encoding["input_ids"])
        offsets = tuple((int(a), int(b)) for a, b in encoding["offset_mapping"]) if self.tokenizer.is_fast else None
        last = max((message for message, _ in spans), default=-1)
        return Rendered(
            text=text,
            ids=ids,
            offsets=offsets,
            special=tuple(i in self._special for i in ids),
            user_spans=tuple(span for _, span in spans),
            last_user_spans=tuple(span for message, span in spans if message == last),
            templated=self.templated,
            truncated=truncated,
        )

    def _apply(self, messages: Sequence[dict[str, str]]) -> str:
        options: dict[str, Any] = dict(self.section.template_options)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True, **options
                )
            )
        except Exception as error:
            # A template is a program of the model's author: whatever it raises is about these messages.
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"data.template: the chat template refuses messages with roles {roles}: {error}") from error

    def _locate(self, messages: Sequence[dict[str, str]], text: str, prompt_id: str) -> list[tuple[int, Span]]:
        """(message, span) of every place where a user's content stands, in the order of the text."""
        everything = "".join(message["content"] for message in messages)
        fence = "\ue000"
        while fence in everything:
            fence += "\ue001"
        marked = [
            {**message, "content": f"{fence}{place}{fence}"} if message["role"] == "user" else message
            for place, message in enumerate(messages)
        ]
        # Template text and numbers of messages, in turn: text, number, text, ..., text.
        pieces = split_by(f"{fence}([0-9]+){fence}", self._apply(marked))
        spans = _match(text, pieces, messages)
        if spans is None:
            raise UserError(
                f"data.template: the chat template rewrites the user's words of prompt {prompt_id}, so that "
                f"they cannot be "
                "located in its output"
            )
        return spans

    def _truncate(self, messages: list[dict[str, str]], rendered: Rendered, prompt: Prompt) -> Rendered:
        """Cuts the last user message from its beginning, a token at a time, until the prompt fits."""
        assert self.limit is not None
        limit = self.limit
        place = max(i for i, message in enumerate(messages) if message["role"] == "user")
        length = len(rendered.ids)
        if rendered.offsets is None:
            raise UserError("data.too_long: truncate needs a tokenizer with offsets (a fast one)")
        while len(rendered.ids) > limit:
            start, end = rendered.last_user_spans[-1]
            content = rendered.text[start:end]
            inside = [max(a, start) for a, b in rendered.offsets or () if a < end and b > start and a < b]
            over = len(rendered.ids) - limit
            kept = content[inside[over] - start :].lstrip() if over < len(inside) else ""
            if not kept:
                raise UserError(
                    f"prompt {prompt.prompt_id} of {prompt.source} has {length} tokens, allowed are {limit}: "
                    f"without any of "
                    "its last user message it would still be too long"
                )
            # A cut inside a word may give as many tokens as before; one character fewer then ensures an end.
            messages[place] = {"role": "user", "content": kept if len(kept) < len(content) else content[1:]}
            rendered = self._render(messages, prompt.prompt_id, truncated=True)
        return rendered


def render(prompt: Prompt, tokenizer: Any, section: DataSection, max_prompt_tokens: int | None = None) -> Rendered:
    """One prompt; see `Renderer`, which is cheaper for many."""
    return Renderer(tokenizer, section, max_prompt_tokens).render(prompt)


def _match(text: str, pieces: Sequence[str], messages: Sequence[dict[str, str]]) -> list[tuple[int, Span]] | None:
    """Aligns `text` with the template's pieces; None where no way of trimming the contents fits."""
    # Places to go on from: (next piece, position after it, spans so far). Depth first, so untrimmed contents win.
    stack: list[tuple[int, int, list[tuple[int, Span]]]] = []
    if text.startswith(pieces[0]):
        stack.append((1, len(pieces[0]), []))
    while stack:
        piece, position, spans = stack.pop()
        if piece == len(pieces):
            if position == len(text):
                return spans
            continue
        message = int(pieces[piece])
        content = messages[message]["content"]
        forms = dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip()))
        for form in reversed(forms):
            end = position + len(form)
            if text.startswith(form + pieces[piece + 1], position):
                following = [*spans, (message, (position, end))]
                stack.append((piece + 2, end + len(pieces[piece + 1]), following))
    return None
