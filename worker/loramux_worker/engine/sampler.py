"""Logits to tokens, every row with its sequence's own parameters, and nothing waits for the device.

A batch in which nobody asks for more than greedy tokens costs one argmax. Rows that ask for more are worked on
together as a sub-batch, so that one creative request does not make the others wait for what they did not ask for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loramux_kernels import apply_penalties, counter_uniform, draw_tokens, greedy, top_tokens
from loramux_worker.engine.pending_sample import PendingLogprobs, PendingSample
from loramux_worker.engine.protocol import SamplingParameters
from loramux_worker.engine.sequence import Sequence
from loramux_worker.engine.token_usage import TokenUsage
from loramux_worker.engine.transfers import download, upload

_NEVER = float("-inf")
# logits worked on at once: penalties, log-probabilities and a CPU's draw take some 40 bytes for each, a GPU's draw 12
_MOST_ELEMENTS = 1 << 23
_MOST_DRAWN_ON_GPU = 1 << 25


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
        logprobs: list[PendingLogprobs] = []
        for rows in self._chunks(special, sequences):
            pending = self._sample_special(logits, token_ids, rows, [sequences[row] for row in rows])
            if pending is not None:
                logprobs.append(pending)
        return PendingSample(token_ids, logprobs)

    def _chunks(self, rows: list[int], sequences: list[Sequence]) -> Iterator[list[int]]:
        """Rows to work on together, as many as there is memory for."""
        on_gpu = self._device.type == "cuda"
        drawn = [row for row in rows if on_gpu and _is_only_drawn(sequences[row].sampling)]
        others = [row for row in rows if not on_gpu or not _is_only_drawn(sequences[row].sampling)]
        for group, most in ((drawn, _MOST_DRAWN_ON_GPU), (others, _MOST_ELEMENTS)):
            at_once = max(1, most // self._vocab_size)
            for start in range(0, len(group), at_once):
                yield group[start : start + at_once]

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
        """Draw for the rows that have a temperature, into `chosen`."""
        rows = [i for i, s in enumerate(sequences) if s.sampling.temperature > 0]
        if not rows:
            return
        parameters = [sequences[i].sampling for i in rows]
        (on_device, seeds, positions, top_k), (temperature, top_p, min_p) = upload(
            self._device,
            [
                rows,
                [p.seed for p in parameters],
                [sequences[i].num_tokens for i in rows],
                [p.top_k for p in parameters],
            ],
            [[p.temperature for p in parameters], [p.top_p for p in parameters], [p.min_p for p in parameters]],
        )
        subset = logits if len(rows) == len(sequences) else logits[on_device]
        drawn = draw_tokens(subset, temperature, counter_uniform(seeds, positions), top_k, top_p, min_p)
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


def _is_only_drawn(p: SamplingParameters) -> bool:
    return p.logprobs is None and not _has_penalty(p)


def _has_penalty(p: SamplingParameters) -> bool:
    return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
