"""Reasoning parts of answers: told apart, beside calls and constraints."""

from __future__ import annotations

import pytest
from support.fake_engine import FakeEngine, saying
from support.serving import app_around, chat, events_of, service_of
from support.tool_chats import CALLED, HERMES, STRICT, TIME, TOOLS, calls_of, message_of, prompt_of, templated

from dsc_serve.text.chat import ChatTemplate
from dsc_serve.text.tokenizer import Tokenizer

THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "<assistant>{{ begin }}"
)
THOUGHT = "I think.\n\nSo."


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart(engine: FakeEngine, tokenizer: Tokenizer, begun: bool, stream: bool) -> None:
    """A template that opens the reasoning itself, and one that leaves it to the model."""
    template = THINKING.replace("{{ begin }}", "<think>\n" if begun else "")
    app = app_around(engine, templated(tokenizer, template))
    assert service_of(app).dialect.reasoning is not None
    engine.script = saying(("" if begun else "<think>\n") + THOUGHT + "\n</think>\n\nYes.")
    response = chat(app, stream=stream)
    if not stream:
        assert message_of(response) == {
            "role": "assistant",
            "content": "Yes.",
            "refusal": None,
            "reasoning_content": THOUGHT,
        }
        return
    deltas = [event["choices"][0]["delta"] for event in events_of(response)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == THOUGHT
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert sum("reasoning_content" in delta for delta in deltas) > 3


def test_reasoning_goes_with_calls_and_constraints(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = app_around(engine, templated(tokenizer, HERMES + "<think>{# </think> #}"))
    engine.script = saying(f"I need {CALLED}\n</think>\n{CALLED}")
    message = message_of(chat(app, tools=TOOLS, tool_choice="required"))
    assert message["reasoning_content"] == "I need " + CALLED
    assert calls_of(message) == [("weather", '{"city": "Rome"}')]
    asked = engine.submitted[0][2].structured_outputs
    assert asked is not None and asked.reasoning is not None and asked.reasoning.begun
    chat(app, response_format={"type": "json_object"})
    asked = engine.submitted[1][2].structured_outputs
    assert asked is not None and asked.json_object and asked.reasoning is not None
    plain = chat(app, max_tokens=10)
    assert engine.submitted[2][2].structured_outputs is None
    assert message_of(plain)["content"] == "" and "I need" in message_of(plain)["reasoning_content"]


def test_earlier_reasoning_reaches_the_template(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = app_around(engine, templated(tokenizer, THINKING))
    chat(app, messages=[{"role": "assistant", "content": "A", "reasoning_content": "R"}], max_tokens=1)
    assert prompt_of(engine) == "<assistant>RA<assistant>"
    refused = chat(app, messages=[{"role": "user", "content": "A", "reasoning_content": "R"}])
    assert refused.json()["error"]["param"] == "messages.0.reasoning_content"


def test_marks_that_are_special_tokens_are_read_and_others_stay_hidden(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    import tokenizers
    from tokenizers import AddedToken

    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True), AddedToken("[ARGS]", special=True)])
    mark, arguments = (backend.token_to_id(text) for text in ("[TOOL_CALLS]", "[ARGS]"))
    template = "{{ tools }}[TOOL_CALLS]name[ARGS]"
    app = app_around(engine, Tokenizer(backend, eos_token_id=256, chat_template=ChatTemplate(template, {})))
    engine.script = lambda prompt, params: [256, mark, *b"time", arguments, *b"{}", 256]
    assert [call["function"] for call in message_of(chat(app, tools=TOOLS))["tool_calls"]] == [
        {"name": "time", "arguments": "{}"}
    ]
    assert message_of(chat(app))["content"] == "time{}"
    chat(app, tools=[STRICT, TIME])
    asked = engine.submitted[2][2].structured_outputs
    assert asked is not None and asked.calls is not None
    assert asked.calls.triggers == (mark,)
    assert [tool.head for tool in asked.calls.tools] == [("weather", arguments), ("time", arguments)]
