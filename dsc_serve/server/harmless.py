"""Fields that clients send and that change no answer of this server, with the values at which that is so."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dsc_serve.server.fields import Fields, Only

Note = Annotated[str, Field(max_length=1024)]
Notes = dict[str, Any]


class HarmlessFields(Fields):
    """OpenAI's, of its own accounts, caches and shelves: a stored answer would be a change, so `store` is false.

    Beside them those that clients of other servers send with every request, each with its default there.
    """

    metadata: Notes | None = None
    prompt_cache_key: Note | None = None
    prompt_cache_options: Annotated[Any, Only({})] = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None
    safety_identifier: Note | None = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    store: Annotated[Any, Only(False)] = None


class HarmlessGenerationFields(HarmlessFields):
    cache_prompt: bool | None = None
    use_beam_search: Annotated[Any, Only(False)] = None
    length_penalty: Annotated[Any, Only(1, 1.0)] = None
    early_stopping: Annotated[Any, Only(False)] = None
    include_stop_str_in_output: Annotated[Any, Only(False)] = None
    spaces_between_special_tokens: Annotated[Any, Only(True)] = None
    detokenize: Annotated[Any, Only(True)] = None
    bad_words: Annotated[Any, Only([])] = None
    allowed_token_ids: Annotated[Any, Only()] = None
    return_token_ids: Annotated[Any, Only(False)] = None
    return_tokens_as_token_ids: Annotated[Any, Only(False)] = None
