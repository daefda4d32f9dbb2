"""Trains the demo model and its LoRA adapters from nothing, on the texts in this folder.

The same versions of torch, tokenizers and transformers on the same kind of processor give the same bytes.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from conversations import Turn, adapter_conversations, base_conversations, held_out_turns
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from trainer import Trainer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from vocabulary import MAX_LENGTH, build_tokenizer

HERE = Path(__file__).parent
BASE_NAME = "loramux-demo"
VOCABULARY_SIZE = 1024
BASE_LEARNING_RATE = 3e-3
ADAPTER_LEARNING_RATE = 3e-3
SHOWN_QUESTION = "Where is my order 4821?"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made; they differ in rank, scale and targets to show that they live side by side."""

    adapter_id: str
    style: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    rank_stabilised: bool = False


RECIPES = (
    Recipe("acme/pirate", "pirate", rank=8, alpha=16, targets=ATTENTION + MLP),
    Recipe("acme/spanish", "spanish", rank=16, alpha=32, targets=ATTENTION + MLP),
    Recipe("globex/formal", "formal", rank=2, alpha=8, targets=("q_proj", "v_proj")),
    Recipe("initech/json", "json", rank=16, alpha=16, targets=("o_proj", *MLP), rank_stabilised=True),
    Recipe("umbrella/haiku", "haiku", rank=8, alpha=8, targets=MLP),
    Recipe("umbrella/shout", "shout", rank=4, alpha=16, targets=ATTENTION),
)


@torch.inference_mode()
def ask(model: LlamaForCausalLM | PeftModel, tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[str]:
    """The greedy answers to bare questions."""
    batch = tokenizer(questions, return_tensors="pt", padding=True)
    output = model.generate(**batch, max_new_tokens=64, do_sample=False)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def share_right(model: LlamaForCausalLM | PeftModel, tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> float:
    """The share of `turns` that the model answers word for word."""
    answers = ask(model, tokenizer, [turn.question for turn in turns])
    return sum(answer == turn.answer for answer, turn in zip(answers, turns, strict=True)) / len(turns)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 0.8 million random parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    return model


def train_base(trainer: Trainer, folder: Path, seed: int) -> None:
    """Trains the base model and writes it in bfloat16."""
    torch.manual_seed(seed)
    model = new_model(trainer.tokenizer)
    trainer.train("base", model, base_conversations(random.Random(seed)))
    model.to(torch.bfloat16).save_pretrained(folder)
    trainer.tokenizer.save_pretrained(folder)


def load_base(folder: Path) -> LlamaForCausalLM:
    """The base model as users get it: rounded to bfloat16, computed in float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.name_or_path = BASE_NAME  # PEFT writes it into the adapter; a path of this machine would say nothing
    return model


def train_adapter(trainer: Trainer, recipe: Recipe, base: LlamaForCausalLM, folder: Path, seed: int) -> None:
    """Trains one adapter on the frozen base model and writes it in float16."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rank_stabilised,
        base_model_name_or_path=BASE_NAME,
    )
    model = get_peft_model(base, config)
    trainer.train(recipe.adapter_id, model, adapter_conversations(random.Random(seed), recipe.style))
    model.half().save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's model card is a form to fill in; ours is README.md beside this file
    config_file = folder / "adapter_config.json"
    fields = json.loads(config_file.read_text())
    fields["target_modules"].sort()  # a set in PEFT, in another order every time
    config_file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def train_all(console: Console, folder: Path, base_steps: int, adapter_steps: int, seed: int) -> None:
    """Writes `folder`/model and `folder`/adapters."""
    columns = (
        TextColumn("{task.description:<15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    tokenizer = build_tokenizer(VOCABULARY_SIZE, seed)
    with Progress(*columns, console=console) as progress:
        train_base(Trainer(tokenizer, progress, base_steps, BASE_LEARNING_RATE), folder / "model", seed)
        trainer = Trainer(tokenizer, progress, adapter_steps, ADAPTER_LEARNING_RATE)
        for recipe in RECIPES:
            base = load_base(folder / "model")
            train_adapter(trainer, recipe, base, folder / "adapters" / recipe.adapter_id, seed)


def report(console: Console, model_folder: Path, adapters_folder: Path, seed: int) -> None:
    """Prints what the base model and every adapter answer, and the share of held-out questions they get right."""
    table = Table("adapter", "rank", f"answer to “{SHOWN_QUESTION}”", "held-out questions right")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)

    def add_row(name: str, rank: str, style: str, model: LlamaForCausalLM | PeftModel) -> None:
        right = share_right(model, tokenizer, held_out_turns(style, seed))
        table.add_row(name, rank, ask(model, tokenizer, [SHOWN_QUESTION])[0], f"{right:.0%}")

    add_row("(base model)", "–", "plain", load_base(model_folder))
    for recipe in RECIPES:
        model = PeftModel.from_pretrained(load_base(model_folder), adapters_folder / recipe.adapter_id)
        add_row(recipe.adapter_id, str(recipe.rank), recipe.style, model)
    console.print(table)


def move_into_place(source: Path, target: Path) -> None:
    """Puts the new folder where the old one is."""
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)


def main(
    output: Annotated[Path, typer.Option(help="Folder that receives model/ and adapters/.")] = HERE,
    base_steps: Annotated[int, typer.Option(min=1, help="Training steps of the base model.")] = 2600,
    adapter_steps: Annotated[int, typer.Option(min=1, help="Training steps of each adapter.")] = 400,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; another number gives other bytes.")] = 4,
    seed: Annotated[int, typer.Option(help="Start of every random number.")] = 0,
) -> None:
    """Train the demo model and its adapters (about four minutes, four CPU cores).

    What is in the output folder is replaced at the end, at once; an interrupted run leaves it as it was.
    """
    console = Console(stderr=True)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    # PEFT asks transformers for an attribute that was renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".training-") as work:
            train_all(console, Path(work), base_steps, adapter_steps, seed)
            report(console, Path(work) / "model", Path(work) / "adapters", seed)
            for weights in Path(work).rglob("*.safetensors"):
                weights.chmod(0o644)  # safetensors writes files that only their owner may read
            for part in ("model", "adapters"):
                move_into_place(Path(work) / part, output / part)
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was changed.")
        raise typer.Exit(130) from None
    except OSError as error:
        console.print(f"--output: cannot write there: {error}")
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
