"""What a request asks of an engine: its prompt as token ids, and its sampling parameters."""

from __future__ import annotations

import asyncio
import random

from loramux_schemas import ErrorCode, Request
from loramux_schemas.errors import printable
from loramux_worker.engine.protocol import Ready, SamplingParameters
from loramux_worker.errors import RequestFailed
from loramux_worker.text.tokenizer import Tokenizer

_COLDEST = 1e-4  # below it float32 cannot tell the distribution from its maximum


async def prompt_token_ids(request: Request, tokenizer: Tokenizer, limits: Ready) -> list[int]:
    """The prompt, tokenised in a thread of the tokenizer's and cut as `truncate` asks.

    Raises:
        RequestFailed: it has no tokens, tokens that are none of the vocabulary's, or too many of them.
    """
    loop = asyncio.get_running_loop()
    if request.prompt_token_ids is not None:
        ids = list(request.prompt_token_ids)
    elif request.messages is not None:
        messages = [{"role": m.role, "content": m.content} for m in request.messages]
        ids = await loop.run_in_executor(tokenizer.threads, tokenizer.encode_messages, messages)
    else:
        ids = await loop.run_in_executor(tokenizer.threads, tokenizer.encode_prompt, request.prompt or "")
    if (keep := request.parameters.truncate) is not None:
        ids = ids[-keep:]
    if not ids:
        raise RequestFailed(ErrorCode.INVALID_REQUEST, "prompt: has no tokens")
    if (largest := max(ids)) >= limits.vocab_size:
        raise _outside(request, largest, tokenizer, limits.vocab_size)
    if len(ids) >= limits.max_model_len:
        raise RequestFailed(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"the prompt has {len(ids)} tokens; at most {limits.max_model_len - 1} fit beside one generated token",
        )
    return ids


def sampling_parameters(request: Request, eos_token_ids: tuple[int, ...]) -> SamplingParameters:
    """The contract's parameters as the engine takes them; a request without a seed gets one."""
    p = request.parameters
    return SamplingParameters(
        max_new_tokens=p.max_new_tokens,
        min_new_tokens=p.min_new_tokens,
        ignore_eos=p.ignore_eos,
        temperature=0.0 if p.greedy or p.temperature < _COLDEST else p.temperature,
        top_p=p.top_p,
        top_k=p.top_k,
        min_p=p.min_p,
        repetition_penalty=p.repetition_penalty,
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        seed=random.getrandbits(63) if p.seed is None else p.seed,
        eos_token_ids=eos_token_ids,
        stop_token_ids=p.stop_token_ids,
        logprobs=p.logprobs,
    )


def fewest_tokens(request: Request) -> int:
    """How many tokens are generated for sure: a stop string may end it with the first."""
    p = request.parameters
    if p.stop:
        return 1
    if p.ignore_eos and not p.stop_token_ids:
        return p.max_new_tokens
    return max(1, min(p.min_new_tokens, p.max_new_tokens))


def _outside(request: Request, token_id: int, tokenizer: Tokenizer, vocab_size: int) -> RequestFailed:
    """A token for which the model has no row: a wrong id, or one that only the adapter's tokenizer knows."""
    if request.prompt_token_ids is not None:
        return RequestFailed(
            ErrorCode.INVALID_REQUEST, f"prompt_token_ids: {token_id} is outside the vocabulary of {vocab_size}"
        )
    code = ErrorCode.INVALID_REQUEST if request.adapter is None else ErrorCode.ADAPTER_INVALID
    token = printable(tokenizer.token(token_id), limit=80)
    return RequestFailed(
        code, f"the prompt holds '{token}', token {token_id} of the tokenizer, and the model has only {vocab_size}"
    )
