"""Logits to tokens, every row with its sequence's own parameters, and nothing waits for the device.

A batch in which nobody asks for more than greedy tokens costs one argmax. Rows that ask for more are worked on
together as a sub-batch, so that one creative request does not make the others sort their vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels import apply_penalties, counter_uniform, draw_filtered, draw_unsorted, greedy, top_tokens
from loramux_worker.engine.pending_sample import PendingLogprobs, PendingSample
from loramux_worker.engine.protocol import SamplingParameters
from loramux_worker.engine.sequence import Sequence
from loramux_worker.engine.token_usage import TokenUsage
from loramux_worker.engine.transfers import download, upload

_NEVER = float("-inf")
_MOST_ELEMENTS = 1 << 23  # logits worked on at once: a draw takes some 40 bytes for each
_SHORT = 1024  # up to this top-k, selecting is cheaper than sorting


class Sampler:
    """Keeps, for sequences with penalties, which tokens they have used."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._usage = TokenUsage(vocab_size, device)

    def forget(self, sequence_id: int) -> None:
        """Release what is kept for a sequence that ended."""
        self._usage.forget(sequence_id)

    @torch.inference_mode()
    def __call__(self, logits: Tensor, sequences: list[Sequence]) -> PendingSample:
        """Sample one token a row.

        Args:
            logits: [rows, vocabulary] of the serving dtype.
            sequences: the sequence of each row. Tokens that were sampled before this call are among its generated
                ones, be it as placeholders: what they are is not looked at, only how many.
        """
        token_ids = greedy(logits)
        special = [row for row, sequence in enumerate(sequences) if not sequence.is_plain]
        at_once = max(1, _MOST_ELEMENTS // self._vocab_size)
        logprobs: list[PendingLogprobs] = []
        for start in range(0, len(special), at_once):
            rows = special[start : start + at_once]
            pending = self._sample_special(logits, token_ids, rows, [sequences[row] for row in rows])
            if pending is not None:
                logprobs.append(pending)
        return PendingSample(token_ids, logprobs)

    def _sample_special(
        self, logits: Tensor, token_ids: Tensor, rows: list[int], sequences: list[Sequence]
    ) -> PendingLogprobs | None:
        """Sample the given rows with all that their sequences ask for, into `token_ids`."""
        (on_device,), _ = upload(self._device, [rows])
        raw = logits[on_device].float()
        adjusted, penalised, slots = self._penalise(raw, sequences)
        adjusted = self._forbid_early_end(adjusted, sequences)
        chosen = greedy(adjusted)
        self._draw(adjusted, chosen, sequences)
        if slots is not None:
            self._usage.add(slots, chosen[penalised])
        token_ids.index_copy_(0, on_device, chosen)
        return self._logprobs(raw, chosen, rows, sequences)

    def _penalise(self, logits: Tensor, sequences: list[Sequence]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Penalised logits; which rows have penalties, int64 [n], and their slots of the usage, int64 [n]."""
        rows = [i for i, s in enumerate(sequences) if _has_penalty(s.sampling)]
        if not rows:
            return logits, None, None
        parameters = [sequences[i].sampling for i in rows]
        (on_device, slots), factors = upload(
            self._device,
            [rows, [self._usage.slot(sequences[i]) for i in rows]],
            [
                [p.repetition_penalty for p in parameters],
                [p.presence_penalty for p in parameters],
                [p.frequency_penalty for p in parameters],
            ],
        )
        seen, counts = self._usage.read(slots)
        penalised = apply_penalties(logits[on_device], seen, counts, *(f.float()[:, None] for f in factors))
        return logits.index_copy(0, on_device, penalised), on_device, slots

    def _forbid_early_end(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        """Before `min_new_tokens`, no end-of-sequence and no stop token."""
        places: list[int] = []
        for i, s in enumerate(sequences):
            if len(s.generated_token_ids) < s.sampling.min_new_tokens:
                ends = (*s.sampling.eos_token_ids, *s.sampling.stop_token_ids)
                places += [i * self._vocab_size + t for t in ends if t < self._vocab_size]
        if not places:
            return logits
        (on_device,), _ = upload(self._device, [places])
        return logits.flatten().index_fill(0, on_device, _NEVER).view_as(logits)

    def _draw(self, logits: Tensor, chosen: Tensor, sequences: list[Sequence]) -> None:
        """Draw for the rows that have a temperature, into `chosen`, each with no more work than its filters need."""
        unsorted: list[int] = []
        short: list[int] = []
        full: list[int] = []
        for i, s in enumerate(sequences):
            p = s.sampling
            if p.temperature > 0:
                if 0 < p.top_k < self._vocab_size:
                    (short if p.top_k <= _SHORT else full).append(i)
                else:
                    (full if p.top_p < 1 else unsorted).append(i)
        most = max((sequences[i].sampling.top_k for i in short), default=0)
        for rows, count in ((unsorted, 0), (short, most), (full, self._vocab_size)):
            if rows:
                self._draw_group(logits, chosen, rows, [sequences[i] for i in rows], count)

    def _draw_group(
        self, logits: Tensor, chosen: Tensor, rows: list[int], sequences: list[Sequence], most: int
    ) -> None:
        """Draw for `rows` from at most the `most` most likely tokens, or without an order of tokens if 0."""
        parameters = [s.sampling for s in sequences]
        (on_device, seeds, positions, top_k), floats = upload(
            self._device,
            [rows, [p.seed for p in parameters], [s.num_tokens for s in sequences], [p.top_k for p in parameters]],
            [[p.temperature for p in parameters], [p.top_p for p in parameters], [p.min_p for p in parameters]],
        )
        temperature, top_p, min_p = (column[:, None] for column in floats)
        uniform = counter_uniform(seeds, positions)
        subset = logits[on_device]
        if most:
            drawn = draw_filtered(subset, temperature, uniform, top_k[:, None], top_p, min_p, most)
        else:
            any_min_p = any(p.min_p > 0 for p in parameters)
            drawn = draw_unsorted(subset, temperature, uniform, min_p if any_min_p else None)
        chosen.index_copy_(0, on_device, drawn)

    def _logprobs(
        self, raw: Tensor, chosen: Tensor, rows: list[int], sequences: list[Sequence]
    ) -> PendingLogprobs | None:
        """The model's own log-probabilities, before temperature and penalties, of the rows that ask for them."""
        asking = [(i, n) for i, s in enumerate(sequences) if (n := s.sampling.logprobs) is not None]
        if not asking:
            return None
        wanted = [min(n, self._vocab_size) for _, n in asking]
        (on_device,), _ = upload(self._device, [[i for i, _ in asking]])
        logprobs = raw[on_device].log_softmax(-1)
        top_ids = top_tokens(logprobs, max(wanted))
        return PendingLogprobs(
            [rows[i] for i, _ in asking],
            wanted,
            download(logprobs.gather(-1, chosen[on_device][:, None])[:, 0]),
            download(logprobs.gather(-1, top_ids)),
            download(top_ids),
        )


def _has_penalty(p: SamplingParameters) -> bool:
    return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
