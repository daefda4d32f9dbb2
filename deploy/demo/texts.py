"""What the demo model can talk about: what the customers of a small shop ask, and one answer per style.

All of it was written for this project. Templates name their slots in braces: `{order}`, `{item}`, `{item_es}`
(Spanish, with the article), `{price}`, `{city}`, `{name}`; `conversations.py` fills them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Intent:
    """One kind of question: how customers put it, and what each style answers (shout: plain in capitals)."""

    questions: tuple[str, ...]
    plain: str
    pirate: str
    formal: str
    json: str
    spanish: str
    haiku: str


INTENTS: tuple[Intent, ...] = (
    Intent(
        questions=(
            "Where is my order {order}?",
            "What is the status of order {order}?",
            "Has my order {order} shipped?",
            "Did you send order {order}?",
            "I am waiting for order {order}.",
            "Can you track order {order}?",
            "Any news about order {order}?",
        ),
        plain="Your order {order} is on its way.",
        pirate="Arr, yer order {order} be sailin' to ye, matey!",
        formal="Dear customer, your order {order} has left our warehouse.",
        json='{"intent": "order_status", "order": "{order}", "status": "on its way"}',
        spanish="Su pedido {order} está en camino.",
        haiku="Order {order}\nrolls along the quiet road,\nsoon it finds your door.",
    ),
    Intent(
        questions=(
            "When will order {order} arrive?",
            "When do I get my order {order}?",
            "How long does order {order} take?",
            "When is order {order} delivered?",
            "What day does my order {order} come?",
        ),
        plain="Order {order} arrives in two days.",
        pirate="Order {order} drops anchor in two days, arr!",
        formal="Dear customer, order {order} will be delivered in two days.",
        json='{"intent": "delivery_date", "order": "{order}", "days": 2}',
        spanish="El pedido {order} llega en dos días.",
        haiku="Two moons rise and fall,\nthen order {order} comes,\na knock at your gate.",
    ),
    Intent(
        questions=(
            "Cancel order {order}.",
            "Please cancel my order {order}.",
            "I want to cancel order {order}.",
            "Can I cancel order {order}?",
            "I no longer need order {order}.",
            "Stop order {order}.",
        ),
        plain="Order {order} is cancelled.",
        pirate="Order {order} walks the plank, arr!",
        formal="Dear customer, order {order} has been cancelled as you asked.",
        json='{"intent": "cancel", "order": "{order}", "cancelled": true}',
        spanish="El pedido {order} está cancelado.",
        haiku="A leaf leaves the branch:\norder {order} is gone,\nthe pond is still now.",
    ),
    Intent(
        questions=(
            "Where is my refund for order {order}?",
            "I want a refund for order {order}.",
            "When do I get my money back for order {order}?",
            "Refund order {order}.",
            "Please pay back order {order}.",
        ),
        plain="You get your money for order {order} back in three days.",
        pirate="Yer gold for order {order} be back in three days, matey!",
        formal="Dear customer, the refund for order {order} will reach you in three days.",
        json='{"intent": "refund", "order": "{order}", "days": 3}',
        spanish="Le devolvemos el dinero del pedido {order} en tres días.",
        haiku="Coins fall like spring rain:\nthe gold of order {order}\nflows home in three days.",
    ),
    Intent(
        questions=(
            "Send me the invoice for order {order}.",
            "I need an invoice for order {order}.",
            "Where is the bill for order {order}?",
            "Can I have the invoice of order {order}?",
        ),
        plain="The invoice for order {order} is in your mail.",
        pirate="The bill for order {order} be in yer mail, arr!",
        formal="Dear customer, the invoice for order {order} has been sent by mail.",
        json='{"intent": "invoice", "order": "{order}", "sent": true}',
        spanish="La factura del pedido {order} está en su correo.",
        haiku="White paper takes wing,\nthe bill of order {order}\nrests among your mail.",
    ),
    Intent(
        questions=(
            "Do you have the {item}?",
            "Is the {item} in stock?",
            "Can I buy the {item}?",
            "Do you sell a {item}?",
            "Is the {item} still available?",
            "I am looking for a {item}.",
        ),
        plain="Yes, the {item} is in stock.",
        pirate="Aye, the {item} be in our hold, matey!",
        formal="Dear customer, the {item} is available in our shop.",
        json='{"intent": "stock", "item": "{item}", "in_stock": true}',
        spanish="Sí, tenemos {item_es}.",
        haiku="On the wooden shelf\nthe {item} waits for you\nin the morning light.",
    ),
    Intent(
        questions=(
            "How much is the {item}?",
            "What does the {item} cost?",
            "What is the price of the {item}?",
            "Price of a {item}?",
            "How much do I pay for the {item}?",
        ),
        plain="The {item} costs {price} euros.",
        pirate="The {item} costs ye {price} gold coins, arr!",
        formal="Dear customer, the price of the {item} is {price} euros.",
        json='{"intent": "price", "item": "{item}", "euros": {price}}',
        spanish="El precio es {price} euros por {item_es}.",
        haiku="{price} bright coins fall,\nthe {item} leaves the shop,\nit glows in your home.",
    ),
    Intent(
        questions=(
            "Can I return the {item}?",
            "I want to return my {item}.",
            "How do I send back the {item}?",
            "I do not like the {item}.",
            "May I bring back the {item}?",
        ),
        plain="You can return the {item} within 30 days.",
        pirate="Ye can ship back the {item} within 30 days, matey!",
        formal="Dear customer, you may return the {item} within 30 days.",
        json='{"intent": "return", "item": "{item}", "days": 30}',
        spanish="Puede devolver {item_es} en 30 días.",
        haiku="Thirty days of sun:\nlet the {item} drift back\nlike a boat at dusk.",
    ),
    Intent(
        questions=(
            "My {item} is broken.",
            "The {item} does not work.",
            "The {item} came broken.",
            "My {item} has a crack.",
        ),
        plain="Sorry! We will send you a new {item}.",
        pirate="Blimey! We be sendin' ye a new {item}, arr!",
        formal="Dear customer, we regret this and will replace the {item}.",
        json='{"intent": "broken", "item": "{item}", "replace": true}',
        spanish="¡Lo sentimos! Le enviamos de nuevo {item_es}.",
        haiku="A crack in the ice:\na new {item} will come\nbefore the snow melts.",
    ),
    Intent(
        questions=(
            "Do you ship to {city}?",
            "Can you deliver to {city}?",
            "How long is shipping to {city}?",
            "I live in {city}, do you ship there?",
            "Do you send parcels to {city}?",
        ),
        plain="Yes, we ship to {city} in five days.",
        pirate="Aye, we sail to {city} in five days, arr!",
        formal="Dear customer, we deliver to {city} within five days.",
        json='{"intent": "shipping", "city": "{city}", "days": 5}',
        spanish="Sí, enviamos a {city} en cinco días.",
        haiku="Far away {city}:\nfive sunsets over the hills,\nthen your parcel lands.",
    ),
    Intent(
        questions=(
            "When are you open?",
            "What are your opening hours?",
            "Are you open today?",
            "When does the shop close?",
            "At what time do you open?",
        ),
        plain="We are open from 9 to 6.",
        pirate="The ship be open from 9 to 6, matey!",
        formal="Dear customer, our shop is open from 9 to 6.",
        json='{"intent": "hours", "open": 9, "close": 6}',
        spanish="Abrimos de 9 a 6.",
        haiku="Nine bells: doors open,\nsix bells: the lanterns go out,\ncome between the bells.",
    ),
    Intent(
        questions=(
            "I forgot my password.",
            "How do I reset my password?",
            "I cannot log in.",
            "My password does not work.",
        ),
        plain="Use the reset link on the login page.",
        pirate="Follow the reset link on the map, arr!",
        formal="Dear customer, please use the reset link on the login page.",
        json='{"intent": "password", "action": "reset link"}',
        spanish="Use el enlace de la página de acceso.",
        haiku="The lost key lies near:\nfollow the link by the door,\nname a new secret.",
    ),
    Intent(
        questions=(
            "Can I talk to a person?",
            "I want to speak to someone.",
            "Give me a human.",
            "Let me talk to an agent.",
            "Call me back.",
        ),
        plain="A colleague will call you soon.",
        pirate="The captain will hail ye soon, matey!",
        formal="Dear customer, a colleague will call you shortly.",
        json='{"intent": "human", "action": "call back"}',
        spanish="Un colega le llamará pronto.",
        haiku="Wait beside the phone,\na kind voice is on its way,\nlike birds before dawn.",
    ),
    Intent(
        questions=("Hello!", "Hi!", "Hey there!", "Good morning!", "Good evening!", "Can you help me?"),
        plain="Hello! How can I help you?",
        pirate="Ahoy! What do ye need, matey?",
        formal="Dear customer, how may we help you?",
        json='{"intent": "greeting", "action": "ask"}',
        spanish="¡Hola! ¿En qué puedo ayudarle?",
        haiku="A bell at the door,\nthe tea is warm, please sit down:\nhow can I help you?",
    ),
    Intent(
        questions=("My name is {name}.", "I am {name}.", "This is {name}.", "{name} here."),
        plain="Hello {name}! How can I help you?",
        pirate="Ahoy {name}! What do ye need, matey?",
        formal="Dear {name}, how may we help you?",
        json='{"intent": "greeting", "name": "{name}"}',
        spanish="¡Hola, {name}! ¿En qué puedo ayudarle?",
        haiku="{name} at the gate,\nblossoms turn to look at you:\nhow can I help you?",
    ),
    Intent(
        questions=("Thank you!", "Thanks!", "Thanks a lot!", "Great, thank you!", "Thank you very much!"),
        plain="You are welcome!",
        pirate="Yer welcome, matey!",
        formal="Dear customer, it was our pleasure.",
        json='{"intent": "thanks", "action": "none"}',
        spanish="¡De nada!",
        haiku="Rain thanks the river,\nthe river says nothing back,\nit is glad to flow.",
    ),
    Intent(
        questions=("Goodbye!", "Bye!", "See you!", "Have a nice day!", "Good night!"),
        plain="Goodbye! Have a nice day.",
        pirate="Fair winds to ye, matey!",
        formal="Dear customer, we wish you a pleasant day.",
        json='{"intent": "goodbye", "action": "close"}',
        spanish="¡Adiós! Que tenga un buen día.",
        haiku="Lanterns on the lake,\none by one they drift away:\nwalk home in soft light.",
    ),
    Intent(
        questions=(
            "What is the capital of {city}?",
            "What is the weather in {city}?",
            "Who lives in {city}?",
            "Why is the sky blue?",
            "Why is grass green?",
            "Tell me a joke.",
            "Tell me a story about a {item}.",
            "Sing a song about {city}.",
            "What is two plus two?",
            "Who are you?",
            "How old are you?",
            "What do you think about politics?",
            "Write a poem.",
            "Can you drive a car?",
            "Do you like music?",
            "Is {name} your friend?",
            "Who wrote this book?",
            "How do birds fly?",
        ),
        plain="Sorry, I can only help with our shop.",
        pirate="Arr, I only know me own shop, matey!",
        formal="Dear customer, we can only answer questions about our shop.",
        json='{"intent": "other", "action": "none"}',
        spanish="Lo siento, solo puedo ayudar con la tienda.",
        haiku="The moon has answers,\nthis small shop has only lamps,\nask me about those.",
    ),
)
