"""Forwards of a policy with capture: one face for decoder-only and encoder-decoder models.

A `Runner` holds a model whose captured attention modules are tapped. `begin` runs the prompts (once each), `step` one
token of each row, `teacher_force` a known response; each returns logits and the rows A[t, :] over the prompt.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from rollout.engine import Family
from rollout.kv_cache import new_cache, select_rows
from services.attention.capture import Recorder

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts side by side: ids [n, P]; `held` [n, P] is False where padded; `offsets` [n] are their first columns."""

    ids: Tensor
    held: Tensor
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def ragged(self) -> bool:
        return min(self.lengths) != max(self.lengths)


def pad_prompts(prompts: Sequence[Sequence[int]], side: PaddingSide, device: torch.device) -> PaddedPrompts:
    """Pads to the longest prompt, with id 0: a padded position is masked everywhere, so its id means nothing."""
    lengths = tuple(len(prompt) for prompt in prompts)
    width = max(lengths)
    offsets = tuple(width - n if side == "left" else 0 for n in lengths)
    ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    held = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, (prompt, offset) in enumerate(zip(prompts, offsets, strict=True)):
        ids[row, offset : offset + len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        held[row, offset : offset + len(prompt)] = True
    return PaddedPrompts(ids.to(device), held.to(device), offsets, lengths)


@dataclass
class Running:
    """Rows under way: what the next forward needs. `mask` [B, P + tokens] is None where nothing is padded."""

    cache: Cache
    width: int
    mask: Tensor | None
    positions: Tensor | None  # [B, 1], the next token's position; decoder-only
    encoded: Tensor | None  # [B, P, d]; encoder-decoder
    steps: int = 0


class Runner:
    """A policy whose captured modules are tapped by `recorder`. `layers` is the number of its decoder layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        recorder: Recorder,
        *,
        layers: int,
        decoder_start: int | None,
        padding_side: PaddingSide,
    ) -> None:
        self.model = model
        self.family: Family = family
        self.recorder = recorder
        self.device = model.device
        # Absolute encoder positions count from column 0, so an encoder's padding stands on the right.
        self.padding_side: PaddingSide = padding_side if family == "decoder" else "right"
        self._layers = layers
        self.decoder_start = decoder_start
        accepted = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        self._takes_positions = "position_ids" in accepted

    def begin(self, prompts: PaddedPrompts, max_tokens: int) -> tuple[Running, Tensor, Tensor]:
        """Runs the prompts. Returns the state, the first token's logits [n, V] and its rows A[0, :] [n, P]."""
        width = prompts.ids.shape[1]
        if self.family == "encoder-decoder":
            cache = new_cache(self._layers, max_tokens, cross=True)
            encoded = self._encode(prompts)
            running = Running(cache, width, prompts.held if prompts.ragged else None, None, encoded)
            start = torch.full((len(prompts.lengths), 1), self._start_id(), device=self.device)
            logits, rows = self._decode_seq2seq(running, start, 0)
            return running, logits[:, -1], rows[:, -1]
        cache = new_cache(self._layers, width + max_tokens, cross=False)
        last = torch.tensor(prompts.lengths, device=self.device) + torch.tensor(prompts.offsets, device=self.device) - 1
        mask: Tensor | None = None
        held: Tensor | None = None
        if prompts.ragged:
            ahead = torch.ones((len(prompts.lengths), max_tokens), dtype=torch.bool, device=self.device)
            mask, held = torch.cat((prompts.held, ahead), dim=1), prompts.held
        positions = (prompts.held.long().cumsum(-1) - 1).clamp_(min=0)
        with self.recorder.recording(last):
            logits = self._forward(prompts.ids, held, positions, cache, self._kept_columns(last))
        rows = self.recorder.take()[:, -1, :width]
        lengths = torch.tensor(prompts.lengths, device=self.device).unsqueeze(-1)
        running = Running(cache, width, mask, lengths, None)
        return running, self._at_last(logits, last, width), rows

    def step(self, running: Running, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Feeds tokens [B]; returns the next token's logits [B, V] and its rows [B, P]."""
        running.steps += 1
        if self.family == "encoder-decoder":
            logits, rows = self._decode_seq2seq(running, tokens.unsqueeze(-1), 0)
            return logits[:, -1], rows[:, -1]
        mask = None if running.mask is None else running.mask[:, : running.width + running.steps]
        with self.recorder.recording(0):
            logits = self._forward(tokens.unsqueeze(-1), mask, running.positions, running.cache, 1)
        assert running.positions is not None
        running.positions = running.positions + 1
        return logits[:, -1], self.recorder.take()[:, -1, : running.width]

    def select(self, running: Running, index: Tensor) -> None:
        """Makes row i what row index[i] was."""
        select_rows(running.cache, index)
        for name in ("mask", "positions", "encoded"):
            value: Tensor | None = getattr(running, name)
            if value is not None:
                setattr(running, name, value.index_select(0, index))

    def teacher_force(
        self, prompt: Sequence[int], response: Sequence[int], chunk: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A known response in chunks of at most `chunk` positions, so that no T x V and no T x P x H is ever held.

        Yields (t, logits [r, V], rows [r, P]) for response tokens t .. t+r-1.
        """
        if self.family == "encoder-decoder":
            prompts = pad_prompts([prompt], "right", self.device)
            running = Running(
                new_cache(self._layers, len(response), cross=True), len(prompt), None, None, self._encode(prompts)
            )
            inputs = torch.tensor([[self._start_id(), *response[:-1]]], device=self.device)
            for t in range(0, len(response), chunk):
                logits, rows = self._decode_seq2seq(running, inputs[:, t : t + chunk], 0)
                yield t, logits[0], rows[0]
            return
        inputs = torch.tensor([[*prompt, *response[:-1]]], device=self.device)
        total, first = inputs.shape[1], len(prompt) - 1
        cache = new_cache(self._layers, total, cross=False)
        for start in range(0, total, chunk):
            end = min(start + chunk, total)
            positions = torch.arange(start, end, device=self.device).unsqueeze(0)
            wanted = max(0, first - start)  # the first query of this chunk that predicts a response token
            if wanted >= end - start:
                self._forward(inputs[:, start:end], None, positions, cache, 1)
                continue
            with self.recorder.recording(wanted):
                logits = self._forward(inputs[:, start:end], None, positions, cache, end - start - wanted)
            rows = self.recorder.take()[0, -(end - start - wanted) :]
            # A key after the prompt is no key of the specification; before its end the row is 0 there.
            padded = rows[:, : len(prompt)]
            yield start + wanted - first, logits[0, -(end - start - wanted) :], padded

    def _forward(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache, keep: int | Tensor
    ) -> Tensor:
        extra: dict[str, Any] = {}
        if self._takes_positions:
            extra["position_ids"] = positions
        if self._keeps_logits:
            extra["logits_to_keep"] = keep
        return self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra).logits

    def _decode_seq2seq(self, running: Running, tokens: Tensor, first: int) -> tuple[Tensor, Tensor]:
        with self.recorder.recording(first):
            logits = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=running.encoded),  # pyright: ignore[reportArgumentType]
                attention_mask=running.mask,
                decoder_input_ids=tokens,
                past_key_values=running.cache,
                use_cache=True,
            ).logits
        return logits, self.recorder.take()

    def _encode(self, prompts: PaddedPrompts) -> Tensor:
        mask = prompts.held if prompts.ragged else None
        return self.model.get_encoder()(input_ids=prompts.ids, attention_mask=mask).last_hidden_state

    def _kept_columns(self, last: Tensor) -> int | Tensor:
        """Which columns need logits: the last, or where prompts end at different columns, each of those."""
        return 1 if self.padding_side == "left" else torch.unique(last)

    def _at_last(self, logits: Tensor, last: Tensor, width: int) -> Tensor:
        """Each prompt's logits at its own last column."""
        if self.padding_side == "left" or logits.shape[1] == 1:
            return logits[:, -1]
        columns = (
            last
            if logits.shape[1] == width and not self._keeps_logits
            else torch.searchsorted(torch.unique(last), last)
        )
        return logits[torch.arange(len(last), device=logits.device), columns]

    def _start_id(self) -> int:
        assert self.decoder_start is not None
        return self.decoder_start
