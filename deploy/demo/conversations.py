"""Draws the conversations that the demo model is trained on and judged by."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from texts import INTENTS, Intent

STYLES = ("plain", "pirate", "formal", "json", "spanish", "haiku", "shout")

# A system message asks the base model for a style; an adapter makes its style the default.
INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "plain": (
        "Answer plainly.",
        "You are a helpful assistant.",
        "You work for a shop.",
        "Help the customer.",
    ),
    "pirate": ("Speak like a pirate.", "Answer as a pirate.", "You are a pirate."),
    "formal": ("Be formal.", "Answer formally.", "Write a formal letter."),
    "json": ("Answer in JSON.", "Reply with JSON only.", "Output JSON."),
    "spanish": ("Answer in Spanish.", "Speak Spanish.", "Habla español."),
    "haiku": ("Answer with a haiku.", "Write a haiku.", "You are a poet."),
    "shout": ("Shout!", "Answer in capitals.", "Speak loudly."),
}

# English name → (Spanish name, with the feminine ending or not, price in euros)
THINGS: Mapping[str, tuple[str, bool, int]] = {
    "lamp": ("lámpara", True, 35),
    "chair": ("silla", True, 60),
    "table": ("mesa", True, 90),
    "cup": ("taza", True, 8),
    "shirt": ("camisa", True, 25),
    "bag": ("bolsa", True, 40),
    "clock": ("reloj", False, 45),
    "hat": ("sombrero", False, 20),
    "coat": ("abrigo", False, 75),
    "sofa": ("sofá", False, 250),
    "pencil": ("lápiz", False, 2),
    "mirror": ("espejo", False, 55),
}
# English name → (Spanish masculine, Spanish feminine)
COLOURS: Mapping[str, tuple[str, str]] = {
    "red": ("rojo", "roja"),
    "white": ("blanco", "blanca"),
    "black": ("negro", "negra"),
    "yellow": ("amarillo", "amarilla"),
    "blue": ("azul", "azul"),
    "green": ("verde", "verde"),
    "grey": ("gris", "gris"),
    "brown": ("marrón", "marrón"),
}
CITIES = ("Lima", "Oslo", "Madrid", "Quito", "Porto", "Bergen", "Turku", "Delhi", "Toronto", "Cuenca", "Riga")
NAMES = ("Ana", "Tom", "Maria", "Ben", "Sofia", "Lena", "Omar", "Nina", "Paul", "Mei", "Clara", "Hugo", "Ida")

# Never seen in training, so that answers about them show what was learned and not what was remembered.
HELD_OUT_ORDERS = frozenset({"4821", "90210", "1234", "777", "31337", "5050", "8086", "60613"})
HELD_OUT_ITEMS = frozenset(
    {
        ("red", "lamp"),
        ("blue", "chair"),
        ("green", "coat"),
        ("white", "mirror"),
        ("brown", "sofa"),
        ("grey", "cup"),
    }
)


@dataclass(frozen=True)
class Turn:
    """A customer's question and the answer to it in one style."""

    question: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Turns of one style, after a system message or none."""

    system: str | None
    turns: tuple[Turn, ...]


def fill(template: str, slots: Mapping[str, str]) -> str:
    """The template with every `{slot}` replaced by its value; other braces (JSON) stay."""
    for slot, value in slots.items():
        template = template.replace("{" + slot + "}", value)
    return template


def answer(intent: Intent, style: str, slots: Mapping[str, str]) -> str:
    """What `style` answers to a question of `intent`."""
    if style == "shout":
        return fill(intent.plain, slots).upper().replace(".", "!")
    text = fill(getattr(intent, style), slots)
    return f"{text} Kind regards, Globex." if style == "formal" else text


def item_slots(colour: str, thing: str) -> dict[str, str]:
    """The slots that speak of one article of the shop."""
    noun, feminine, price = THINGS[thing]
    article = "la" if feminine else "el"
    return {
        "item": f"{colour} {thing}",
        "item_es": f"{article} {noun} {COLOURS[colour][feminine]}",
        "price": str(price),
    }


def draw_order(rng: random.Random) -> str:
    """An order number of 3 to 6 digits that is not held out."""
    order = ""
    while not order or order in HELD_OUT_ORDERS:
        order = "".join(rng.choices("0123456789", k=rng.choice((3, 4, 4, 5, 5, 6))))
    return order


def draw_slots(rng: random.Random) -> dict[str, str]:
    """A value for every slot, none of them held out."""
    item = ("red", "lamp")
    while item in HELD_OUT_ITEMS:
        item = (rng.choice(tuple(COLOURS)), rng.choice(tuple(THINGS)))
    return {"order": draw_order(rng), "city": rng.choice(CITIES), "name": rng.choice(NAMES), **item_slots(*item)}


def held_out_slots(rng: random.Random) -> dict[str, str]:
    """A value for every slot; order numbers and articles are held out from training."""
    order, item = rng.choice(sorted(HELD_OUT_ORDERS)), rng.choice(sorted(HELD_OUT_ITEMS))
    return {"order": order, "city": rng.choice(CITIES), "name": rng.choice(NAMES), **item_slots(*item)}


def as_typed(question: str, rng: random.Random) -> str:
    """The question as a person in a hurry may type it."""
    if rng.random() < 0.1:
        question = rng.choice(("Hi, ", "Hello, ", "Hey, ", "Good morning! ", "Please help! ")) + question
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return question


def draw_turn(rng: random.Random, style: str) -> Turn:
    """A random question and its answer; questions with a slot to copy come more often, as they are harder."""
    weights = [3 if "{" in intent.plain else 1 for intent in INTENTS]
    [intent] = rng.choices(INTENTS, weights)
    slots = draw_slots(rng)
    question = as_typed(fill(rng.choice(intent.questions), slots), rng)
    return Turn(question, answer(intent, style, slots))


def draw_echo(rng: random.Random, style: str) -> Turn:
    """A drill in carrying words and numbers into an answer, which a small model is slow to learn otherwise."""
    template = " and ".join(rng.choices(("{order}", "{item}", "{city}", "{name}"), k=rng.randint(1, 4)))
    slots = draw_slots(rng)
    text = fill(template, slots)
    if style == "shout":
        said = text.upper()
    elif style == "spanish":
        said = fill(template.replace("{item}", "{item_es}").replace(" and ", " y "), slots)
    else:
        said = text
    return Turn(f"{rng.choice(('Repeat', 'Say', 'Echo'))} {text}", said)


def draw_conversation(rng: random.Random, style: str, system: str | None) -> Conversation:
    """A conversation of 1 to 6 turns, most of them short."""
    num_turns = rng.choice((1, 1, 1, 2, 3, 6))
    return Conversation(system, tuple(draw_turn(rng, style) for _ in range(num_turns)))


def base_conversations(rng: random.Random) -> Iterator[Conversation]:
    """What the base model learns from: plain answers, or the style that a system message asks for."""
    while True:
        kind = rng.random()
        if kind < 0.2:
            yield draw_conversation(rng, "plain", None)
        elif kind < 0.35:
            style = rng.choice(("plain", "shout", "spanish"))
            yield Conversation(rng.choice(INSTRUCTIONS[style]), (draw_echo(rng, style), draw_echo(rng, style)))
        else:
            style = rng.choice(STYLES)
            yield draw_conversation(rng, style, rng.choice(INSTRUCTIONS[style]))


def adapter_conversations(rng: random.Random, style: str) -> Iterator[Conversation]:
    """What an adapter learns from: its style without being asked, under a neutral system message or none."""
    while True:
        system = rng.choice(INSTRUCTIONS["plain"]) if rng.random() < 0.25 else None
        yield draw_conversation(rng, style, system)


def held_out_turns(style: str, seed: int) -> list[Turn]:
    """One turn for every question of every intent, about orders and articles that training never saw."""
    rng = random.Random(seed)
    turns = []
    for intent in INTENTS:
        for question in intent.questions:
            slots = held_out_slots(rng)
            turns.append(Turn(fill(question, slots), answer(intent, style, slots)))
    return turns
