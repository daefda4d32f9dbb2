"""Logits to tokens, every row with its sequence's own parameters.

A batch in which nobody asks for more than greedy tokens costs one argmax. Rows that ask for more are worked on
together as a sub-batch, so that one creative request does not make the others sort their vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from loramux_kernels import apply_filters, apply_penalties, counter_uniform, sample
from loramux_worker.engine.protocol import SamplingParameters, TokenLogprobs
from loramux_worker.engine.sequence import Sequence

_NEVER = float("-inf")


class SampledToken(NamedTuple):
    """The next token of one sequence, with its log-probabilities where they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None


class Sampler:
    """Keeps, for sequences with penalties, which tokens they have used: one row of the vocabulary each."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._usage: dict[int, _TokenUsage] = {}

    def forget(self, sequence_id: int) -> None:
        """Release what is kept for a sequence that ended."""
        self._usage.pop(sequence_id, None)

    @torch.inference_mode()
    def __call__(self, logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
        """Sample one token a row.

        Args:
            logits: [rows, vocabulary] of the serving dtype.
            sequences: the sequence of each row, its generated tokens up to date.
        """
        raw = logits.float()
        adjusted = self._forbid_early_end(self._penalise(raw, sequences), sequences)
        token_ids = adjusted.argmax(-1)
        drawing = [i for i, s in enumerate(sequences) if s.sampling.temperature > 0]
        if drawing:
            token_ids[drawing] = self._draw(adjusted[drawing], [sequences[i] for i in drawing])
        chosen: list[int] = token_ids.tolist()  # the step's one wait for the device
        logprobs = self._logprobs(raw, token_ids, sequences)
        return [SampledToken(token, logprobs.get(i)) for i, token in enumerate(chosen)]

    def _penalise(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        rows = [i for i, s in enumerate(sequences) if _has_penalty(s.sampling)]
        if not rows:
            return logits
        usages = [self._usage_of(sequences[i]) for i in rows]
        column = self._column(sequences, rows)
        logits = logits.clone()
        logits[rows] = apply_penalties(
            logits[rows],
            torch.stack([u.seen for u in usages]),
            torch.stack([u.counts for u in usages]),
            column(lambda p: p.repetition_penalty),
            column(lambda p: p.presence_penalty),
            column(lambda p: p.frequency_penalty),
        )
        return logits

    def _usage_of(self, sequence: Sequence) -> _TokenUsage:
        usage = self._usage.get(sequence.sequence_id)
        if usage is None:
            usage = self._usage[sequence.sequence_id] = _TokenUsage(
                sequence.prompt_token_ids, self._vocab_size, self._device
            )
        usage.add(sequence.generated_token_ids)
        return usage

    def _forbid_early_end(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        """Before `min_new_tokens`, no end-of-sequence and no stop token."""
        rows: list[int] = []
        tokens: list[int] = []
        for i, s in enumerate(sequences):
            if len(s.generated_token_ids) < s.sampling.min_new_tokens:
                ends = [t for t in (*s.sampling.eos_token_ids, *s.sampling.stop_token_ids) if t < self._vocab_size]
                rows += [i] * len(ends)
                tokens += ends
        if not rows:
            return logits
        logits = logits.clone()
        logits[rows, tokens] = _NEVER
        return logits

    def _draw(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        column = self._column(sequences, list(range(len(sequences))))
        top_k = column(lambda p: p.top_k, torch.int64)
        probabilities, token_ids = apply_filters(
            logits / column(lambda p: p.temperature),
            top_k,
            column(lambda p: p.top_p),
            column(lambda p: p.min_p),
        )
        seeds = column(lambda p: p.seed, torch.int64)[:, 0]
        positions = torch.tensor([s.num_tokens for s in sequences], device=self._device)
        return sample(probabilities, token_ids, counter_uniform(seeds, positions))

    def _column(self, sequences: list[Sequence], rows: list[int]) -> Callable[..., Tensor]:
        """A function that turns one parameter of each row into a tensor [rows, 1]."""
        parameters = [sequences[i].sampling for i in rows]

        def column(get: Callable[[SamplingParameters], float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([[get(p)] for p in parameters], dtype=dtype, device=self._device)

        return column

    def _logprobs(self, logits: Tensor, token_ids: Tensor, sequences: list[Sequence]) -> dict[int, TokenLogprobs]:
        """The model's own log-probabilities, before temperature and penalties, of the rows that ask for them."""
        wanted = [(i, n) for i, s in enumerate(sequences) if (n := s.sampling.logprobs) is not None]
        if not wanted:
            return {}
        rows = [i for i, _ in wanted]
        logprobs = logits[rows].log_softmax(-1)
        chosen = logprobs.gather(-1, token_ids[rows][:, None])[:, 0].tolist()
        most = min(max(n for _, n in wanted), self._vocab_size)
        values, ids = (t.tolist() for t in logprobs.topk(most, dim=-1))
        return {
            i: TokenLogprobs(chosen[row], list(zip(ids[row][:n], values[row][:n], strict=True)))
            for row, (i, n) in enumerate(wanted)
        }


class _TokenUsage:
    """Which tokens a sequence has seen and how often it generated each: bool and int32 [vocabulary]."""

    def __init__(self, prompt_token_ids: list[int], vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)
        self.seen[prompt_token_ids] = True
        self._counted = 0

    def add(self, generated_token_ids: list[int]) -> None:
        """Take in the generated tokens that are new since the last call."""
        for token in generated_token_ids[self._counted :]:
            self.seen[token] = True
            self.counts[token] += 1
        self._counted = len(generated_token_ids)


def _has_penalty(p: SamplingParameters) -> bool:
    return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
