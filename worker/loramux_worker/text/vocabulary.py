"""Whether an adapter's tokenizer speaks of the tokens that the model has."""

from __future__ import annotations

from loramux_worker.adapters.invalid import AdapterInvalid, quoted
from loramux_worker.text.pipeline import Pipeline


def check_vocabulary(model: Pipeline, adapter: Pipeline) -> None:
    """Refuse an adapter's tokenizer by which the model's tokens would be read or written as others.

    Every token of the model must have the same id in the adapter's, and no other token may have that id; tokens must
    become text in the same way. Then every id that the engine computes means what it means to the model. What may
    differ is how a text is prepared and which tokens are special: that is how fine-tunes differ.

    Tokens that the adapter adds behind the model's are taken: PEFT would feed them to the model too, which often has
    rows to spare. A prompt that holds one for which the model has no row is refused by itself (`prompts.py`), and an
    adapter that brings such rows (resized embeddings) when its weights are read.

    Raises:
        AdapterInvalid: the vocabulary differs; the reason names a token that does.
    """
    known, own = model.vocabulary(), adapter.vocabulary()
    if own != known:
        _compare(known, own)
    if adapter.decoder != model.decoder:
        raise AdapterInvalid("its tokenizer turns tokens into text otherwise than the model's (decoder)")


def _compare(known: dict[str, int], own: dict[str, int]) -> None:
    for token, token_id in sorted(known.items(), key=lambda entry: entry[1]):
        if own.get(token) != token_id:
            place = "is no token" if token not in own else f"is token {own[token]}"
            raise _differs(f"{quoted(token)}, token {token_id} of the model, {place} there")
    ids = set(known.values())
    for token in own.keys() - known.keys():
        if own[token] in ids:
            raise _differs(f"{quoted(token)} has the id {own[token]} of another token of the model")


def _differs(what: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"the vocabulary of its tokenizer is not the model's: {what}; remove its tokenizer files to use the model's"
    )
