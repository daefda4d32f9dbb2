from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from loramux_schemas import AdapterName, ChatMessage, InvalidRequest, Parameters, Request


def read(**fields: object) -> Request:
    return Request.from_json(json.dumps({"request_id": "r", **fields}).encode())


def refused(**fields: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    message = caught.value.message
    assert message.isprintable(), "one line, nothing that a terminal would act on"
    return caught.value


def refused_parameter(**parameters: object) -> str:
    return refused(prompt="x", parameters=parameters).message


def test_the_smallest_request_has_the_defaults_of_the_contract() -> None:
    request = read(prompt="x")
    assert request.adapter is None
    assert request.model_dump() == {
        "request_id": "r",
        "adapter_id": None,
        "prompt": "x",
        "messages": None,
        "prompt_token_ids": None,
        "parameters": {
            "max_new_tokens": 256,
            "min_new_tokens": 0,
            "ignore_eos": False,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "do_sample": False,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": None,
            "stop": (),
            "stop_token_ids": (),
            "logprobs": None,
            "return_full_text": False,
            "truncate": None,
            "skip_special_tokens": True,
        },
        "stream": False,
        "priority": 0,
        "deadline_ms": None,
        "metadata": None,
    }


def test_every_field_is_read() -> None:
    parameters = {
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "ignore_eos": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "do_sample": True,
        "repetition_penalty": 1.2,
        "presence_penalty": -1.0,
        "frequency_penalty": 2,
        "seed": 2**63 - 1,
        "stop": ["\n\n"],
        "stop_token_ids": [3],
        "logprobs": 0,
        "return_full_text": True,
        "truncate": 5,
        "skip_special_tokens": False,
    }
    request = read(
        adapter_id="acme/support@sha256:ab12",
        messages=[{"role": "user", "content": "hi"}],
        parameters=parameters,
        stream=True,
        priority=-1000,
        deadline_ms=1_700_000_000_000,
        metadata={"a": [1, {"b": None}]},
    )
    assert request.adapter == AdapterName("acme/support", "sha256:ab12")
    assert request.messages == (ChatMessage(role="user", content="hi"),)
    assert request.parameters.model_dump() == {**parameters, "stop": ("\n\n",), "stop_token_ids": (3,)}
    assert request.stream is True
    assert (request.priority, request.deadline_ms) == (-1000, 1_700_000_000_000)
    assert request.metadata == {"a": [1, {"b": None}]}


def test_a_tgi_payload_works() -> None:
    request = read(inputs="Hello", parameters={"max_tokens": 7, "top_k": None, "seed": None}, stream=None)
    assert request.prompt == "Hello"
    assert request.parameters == Parameters(max_new_tokens=7)


def test_json_out_leaves_defaults_away_and_reads_back() -> None:
    request = Request(request_id="r", prompt="x", parameters=Parameters(stop=("a",)), metadata={"n": 1})
    assert json.loads(request.to_json()) == {
        "request_id": "r",
        "prompt": "x",
        "parameters": {"stop": ["a"]},
        "metadata": {"n": 1},
    }
    assert Request.from_json(request.to_json()) == request


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = read(messages=[{"role": "user", "content": parts}])
    assert request.messages == (ChatMessage(role="user", content="ab"),)


@pytest.mark.parametrize(
    ("do_sample", "temperature", "greedy"), [(False, 1.0, True), (True, 0, True), (True, 0.1, False)]
)
def test_greedy(do_sample: bool, temperature: float, greedy: bool) -> None:
    assert Parameters(do_sample=do_sample, temperature=temperature).greedy is greedy


@pytest.mark.parametrize(
    "field_and_value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", "5"),
        ("max_new_tokens", 5.0),
        ("max_new_tokens", True),
        ("max_new_tokens", 2**31),
        ("min_new_tokens", -1),
        ("min_new_tokens", 257),
        ("ignore_eos", 1),
        ("ignore_eos", "true"),
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("do_sample", 0),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 2**80),
        ("stop", "text"),
        ("stop", ["a"] * 17),
        ("stop_token_ids", 5),
        ("logprobs", -1),
        ("logprobs", 21),
        ("return_full_text", "yes"),
        ("truncate", 0),
        ("skip_special_tokens", []),
        ("no_such_field", None),
    ],
)
def test_a_bad_parameter_is_named(field_and_value: tuple[str, object]) -> None:
    field, value = field_and_value
    assert refused_parameter(**{field: value}).startswith(f"parameters.{field}: ")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
def test_numbers_are_finite(field: str, constant: str) -> None:
    value = f'{{"request_id": "r", "prompt": "x", "parameters": {{"{field}": {constant}}}}}'
    with pytest.raises(InvalidRequest, match=rf"^parameters\.{field}: must be a finite number$"):
        Request.from_json(value.encode())


def test_items_are_named_by_their_place() -> None:
    assert refused_parameter(stop=["a", ""]).startswith("parameters.stop.1: ")
    assert refused_parameter(stop=["a" * 257]).startswith("parameters.stop.0: ")
    assert refused_parameter(stop_token_ids=[1, -1]).startswith("parameters.stop_token_ids.1: ")
    assert refused(prompt_token_ids=[0, -1]).message.startswith("prompt_token_ids.1: ")
    assert refused(prompt_token_ids=[0, True]).message.startswith("prompt_token_ids.1: ")
    assert refused(messages=[{"role": "u", "content": "x"}, "y"]).message.startswith("messages.1: ")
    assert refused(messages=[{"role": "", "content": "x"}]).message.startswith("messages.0.role: ")
    assert refused(messages=[{"role": "u"}]).message.startswith("messages.0.content: ")
    assert refused(messages=[{"role": "u", "content": 1}]).message.startswith("messages.0.content: ")
    assert refused(messages=[{"role": "u", "content": [1]}]).message.startswith("messages.0.content: ")
    assert refused(messages=[{"role": "u", "content": "", "tool": 1}]).message.startswith("messages.0.tool: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("messages", []),
        ("messages", {}),
        ("prompt_token_ids", []),
        ("prompt_token_ids", "12"),
        ("parameters", []),
        ("stream", 1),
        ("priority", 1001),
        ("priority", 0.5),
        ("deadline_ms", -1),
        ("deadline_ms", 1.5),
        ("metadata", "text"),
        ("metadata", {"a": "x" * 16384}),
        ("adapter_id", 5),
        ("adapter_id", ""),
        ("adapter_id", "../../etc"),
        ("adapter_id", "a" * 257),
        ("unknown", 1),
        ("request_id", ""),
        ("request_id", "r" * 257),
    ],
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    others = {} if field in ("prompt", "messages", "prompt_token_ids") else {"prompt": "x"}
    error = refused(**{**others, field: value})
    assert error.message.startswith(f"{field}: ")
    assert error.request_id == (value if field == "request_id" else "r")


def test_exactly_one_prompt() -> None:
    assert refused().message.startswith("prompt: ")
    assert refused(prompt="", messages=[{"role": "u", "content": "x"}]).message.startswith("messages: ")
    assert refused(prompt="x", prompt_token_ids=[1]).message.startswith("prompt_token_ids: ")
    assert read(prompt="x", messages=None).prompt == "x"
    assert read(prompt="").prompt == ""


def test_a_field_and_its_other_name_are_one_too_many() -> None:
    assert refused(prompt="x", inputs="x").message.startswith("inputs: is another name for prompt")
    assert refused(inputs="x", prompt="x").message.startswith("prompt: is another name for inputs")
    both = {"max_tokens": 1, "max_new_tokens": 1}
    assert refused(prompt="x", parameters=both).message.startswith("parameters.max_new_tokens: ")
    assert read(inputs="x", prompt=None).prompt == "x"


def test_an_unknown_field_gets_a_hint() -> None:
    assert refused_parameter(topp=1) == "parameters.topp: unknown field (did you mean top_p?)"


def test_a_refusal_echoes_what_is_valid() -> None:
    error = refused(stream=1, adapter_id="a/b@r1", metadata={"trace": "7"})
    assert (error.request_id, error.adapter_id, error.metadata) == ("r", "a/b", {"trace": "7"})
    error = refused(stream=1, adapter_id="a/../b", metadata=["x"])
    assert (error.adapter_id, error.metadata) == (None, None)
    with pytest.raises(InvalidRequest) as caught:
        Request.from_json(b'{"request_id": "r", "adapter_id": "a", "metadata": {"n": NaN}, "prompt": "x"}')
    assert (caught.value.adapter_id, caught.value.metadata) == ("a", None)


def test_half_a_surrogate_pair_is_answered_with_the_field() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: "):
        Request.from_json(b'{"request_id": "r", "prompt": "a\\ud83d"}')
    assert read(prompt="\U0001f600").prompt == "\U0001f600"  # json.dumps writes it as a pair
    with pytest.raises(ValidationError, match="surrogate"):
        Request(request_id="r", prompt="\ud83d")


def test_metadata_is_json_and_nothing_else() -> None:
    deep: object = 1
    for _ in range(65):
        deep = {"a": deep}
    for value in ({"a": object()}, {"a": float("nan")}, {1: 2}, {"a": 2**70}, {"a": "\ud800"}, deep):
        with pytest.raises(ValidationError, match="metadata"):
            Request(request_id="r", prompt="x", metadata=value)  # type: ignore[arg-type]
    mutable = {"a": [1]}
    request = Request(request_id="r", prompt="x", metadata=mutable)
    mutable["a"].append(2)
    assert request.metadata == {"a": [1]}
