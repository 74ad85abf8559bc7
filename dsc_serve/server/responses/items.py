"""What an answer puts out: its items, and the events that tell of them as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from dsc_serve.server.tools.parts import CallArguments, CallStart, Content, Part, Reasoning

Event = dict[str, Any]
Item = dict[str, Any]
# of items with text: the item, its part, and the names of the events for more of it and for its end
TEXTS: dict[type[Part], tuple[Item, Item, str]] = {
    Content: (
        {"type": "message", "role": "assistant", "content": []},
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
        "response.output_text",
    ),
    Reasoning: (
        {"type": "reasoning", "summary": [], "content": []},
        {"type": "reasoning_text", "text": ""},
        "response.reasoning_text",
    ),
}
ID_STARTS = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


class ResponseOutput:
    """The items so far; the last one may be open. Each method returns events, without their numbers."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._kind: type[Part] | None = None  # of the open item

    def add(self, parts: Sequence[Part], logprobs: Sequence[Item] = ()) -> list[Event]:
        """logprobs: of tokens whose text is the last of the parts, or that have none."""
        events: list[Event] = []
        if logprobs and not parts:
            parts = [Content("")]
        for i, part in enumerate(parts):
            if isinstance(part, CallStart):
                events += self.close()
                item = {"type": "function_call", "call_id": part.id, "name": part.name, "arguments": ""}
                events += self._open(item, CallStart)
            elif isinstance(part, CallArguments):
                self.items[-1]["arguments"] += part.text
                events.append(self._event("response.function_call_arguments.delta", delta=part.text))
            else:
                events += self._more_text(part, logprobs if i == len(parts) - 1 else ())
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """End the open item, if there is one."""
        if self._kind is None:
            return []
        kind, item, self._kind = self._kind, self.items[-1], None
        events = []
        if kind is CallStart:
            name, facts = (
                "response.function_call_arguments.done",
                {"arguments": item["arguments"], "name": item["name"]},
            )
            events.append(self._event(name, **facts))
        else:
            (part,) = item["content"]
            name = TEXTS[kind][2]
            more: dict[str, Any] = {"logprobs": part["logprobs"]} if kind is Content else {}
            events.append(self._event(f"{name}.done", content_index=0, text=part["text"], **more))
            events.append(self._event("response.content_part.done", content_index=0, part=part_as_is(part)))
        item["status"] = status
        events.append({"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": copied(item)})
        return events

    @property
    def in_text(self) -> bool:
        """Whether a message is open, or nothing has been put out yet."""
        return self._kind is Content or not self.items

    def _more_text(self, part: Content | Reasoning, logprobs: Sequence[Item]) -> list[Event]:
        events: list[Event] = []
        item, empty, name = TEXTS[type(part)]
        if self._kind is not type(part):
            events += self.close()
            events += self._open(item, type(part))
            self.items[-1]["content"] = [part_as_is(empty)]
            events.append(self._event("response.content_part.added", content_index=0, part=part_as_is(empty)))
        told = self.items[-1]["content"][0]
        told["text"] += part.text
        more: dict[str, Any] = {}
        if type(part) is Content:
            more = {"logprobs": list(logprobs)}
            told["logprobs"] += logprobs
        events.append(self._event(f"{name}.delta", content_index=0, delta=part.text, **more))
        return events

    def _open(self, item: Item, kind: type[Part]) -> list[Event]:
        made = {"id": ID_STARTS[item["type"]] + uuid4().hex, **copied(item), "status": "in_progress"}
        self.items.append(made)
        self._kind = kind
        return [{"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": copied(made)}]

    def _event(self, name: str, /, **facts: Any) -> Event:
        return {"type": name, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **facts}


def copied(item: Item) -> Item:
    """The item as it is now."""
    return {**item, "content": [part_as_is(part) for part in item["content"]]} if "content" in item else dict(item)


def part_as_is(part: Item) -> Item:
    """The same of a part of its content."""
    return {name: list(value) if isinstance(value, list) else value for name, value in part.items()}
