"""The training loop of the demo model, the same for the base model and for an adapter."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from conversations import Conversation
from peft import PeftModel
from rich.progress import Progress
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from vocabulary import ANSWER, MAX_LENGTH

BATCH_SIZE = 16
IGNORED = -100  # label of a token that is not learned


@dataclass(frozen=True)
class Trainer:
    """Trains on batches of conversations; only the answers are learned."""

    tokenizer: PreTrainedTokenizerFast
    progress: Progress
    steps: int
    learning_rate: float

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids as the chat template lays them out, and labels: the answers with their `</s>`."""
        tokenizer = self.tokenizer
        ids, labels = [tokenizer.bos_token_id], [IGNORED]
        system = "" if conversation.system is None else conversation.system + "\n"
        for turn in conversation.turns:
            question = tokenizer.encode(system + turn.question, add_special_tokens=False)
            question.append(tokenizer.convert_tokens_to_ids(ANSWER))
            answer = [*tokenizer.encode(turn.answer, add_special_tokens=False), tokenizer.eos_token_id]
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
            system = ""
        return ids[:MAX_LENGTH], labels[:MAX_LENGTH]

    def batches(self, conversations: Iterator[Conversation]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and labels int64[BATCH_SIZE, length], padded right, of conversations of about one length."""
        order = random.Random(0)
        while True:
            window = map(self.encode, islice(conversations, 16 * BATCH_SIZE))
            encoded = sorted(window, key=lambda row: len(row[0]))
            batches = [encoded[first : first + BATCH_SIZE] for first in range(0, len(encoded), BATCH_SIZE)]
            order.shuffle(batches)
            for rows in batches:
                length = len(rows[-1][0])
                ids = [row + [self.tokenizer.pad_token_id] * (length - len(row)) for row, _ in rows]
                labels = [row + [IGNORED] * (length - len(row)) for _, row in rows]
                yield torch.tensor(ids), torch.tensor(labels)

    def train(self, name: str, model: LlamaForCausalLM | PeftModel, conversations: Iterator[Conversation]) -> None:
        """Fits what is trainable in `model`: AdamW, linear warm-up, then a cosine down to nothing."""
        task = self.progress.add_task(name, total=self.steps, loss=math.nan)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        model.train()
        for ids, labels in islice(self.batches(conversations), self.steps):
            loss = self.loss(model, ids, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            self.progress.update(task, advance=1, loss=loss.item())
        model.eval()

    def loss(self, model: LlamaForCausalLM | PeftModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy (a scalar) of the answer tokens; logits are computed for these alone."""
        llama = model.get_base_model() if isinstance(model, PeftModel) else model
        # Right padding under a causal mask is seen by no real token, so no attention mask is needed.
        hidden = llama.model(input_ids=ids[:, :-1]).last_hidden_state
        targets = labels[:, 1:]
        learned = targets != IGNORED
        return F.cross_entropy(llama.lm_head(hidden[learned]), targets[learned])

    def learning_rate_factor(self, step: int) -> float:
        """The share of the top learning rate at `step`."""
        warm_up = self.steps // 20 + 1
        return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))
