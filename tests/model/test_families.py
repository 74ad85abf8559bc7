"""Checkpoints of every family give, through the paged path, what transformers gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support.families import CASES, LENGTHS, NEW_TOKENS, PROMPTS, chosen, expected, family_folder
from support.family_case import LINEAR
from support.family_files import FILES, family_file
from tokenizers import Tokenizer, models
from torch import Tensor

from dsc_kernels import native
from dsc_serve import LLM, SamplingParams
from dsc_serve.model.architectures import ARCHITECTURES
from dsc_serve.model.checkpoint import load_model, open_source
from dsc_serve.model.config import load_config
from dsc_serve.model.gguf import import_gguf
from dsc_serve.model.gguf_families import FAMILIES
from dsc_serve.model.huggingface import import_huggingface
from dsc_serve.text import tokenizer as text

EXACT = 1e-5  # of a row's logits, relative to their norm
ABSORBED = 1e-4  # where what makes keys and values is multiplied into other matrices first
# Longrope's angles are those of the context that is served: the original one for what is short, a longer one else.
SHORT, LONG = 16, 64
LONGROPE = [name for name, case in CASES.items() if "longrope" in str(case.config.get("rope_scaling"))]
SERVED = [(name, context) for name in CASES for context in ((SHORT, LONG) if name in LONGROPE else (0,))]
FEATURES = [(name, change) for name, case in CASES.items() for change in case.features]


def lasting(name: str, context: int) -> list[int]:
    """Which prompts a context serves as transformers does."""
    return [i for i, n in enumerate(LENGTHS) if context == 0 or (n <= SHORT) == (context == SHORT)]


def exact(name: str) -> float:
    return ABSORBED if "kv_lora_rank" in CASES[name].config else EXACT


def error(got: Tensor, want: Tensor) -> float:
    """The largest of any row, relative to the row."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("families")
    yield {name: family_folder(name, root / str(i)) for i, name in enumerate(CASES)}


@pytest.mark.parametrize("chunk", [64, 5], ids=["whole", "in chunks"])
@pytest.mark.parametrize(("name", "context"), SERVED)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    name: str, context: int, chunk: int, folders: dict[str, Path]
) -> None:
    want, own = expected(name), lasting(name, context)
    settings = {"context": context, "step_tokens": chunk, "max_running": 4, "block_size": 8, "threads": 1}
    prompts = [PROMPTS[i] for i in own]
    with LLM(str(folders[name]), dtype="float32", **settings) as llm:
        together, alone = llm.logits(prompts), [llm.logits([prompt])[0] for prompt in prompts]
        room = [min(NEW_TOKENS, (context or 64) - len(prompt)) for prompt in prompts]
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in room]
        greedy = [output.token_ids for output in llm.generate(prompts, params)]
        each = [llm.generate([prompt], [own])[0].token_ids for prompt, own in zip(prompts, params, strict=True)]
    for found in (together, alone):
        for i, logits in zip(own, found, strict=True):
            assert error(logits[chosen(len(PROMPTS[i]))], want.logits[i]) < exact(name)
    assert greedy == each == [want.greedy[i][:count] for i, count in zip(own, room, strict=True)]


@pytest.mark.parametrize(("name", "change"), FEATURES)
def test_a_field_that_is_read_acts(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    """With another value the logits differ from those of the checkpoint, which the test above holds equal."""
    want, context = expected(name), 0
    if name in LONGROPE:
        same = change["rope_scaling"]["long_factor"] == CASES[name].config["rope_scaling"]["long_factor"]
        context = SHORT if same else LONG
    i = max(lasting(name, context))
    with LLM(str(family_folder(name, tmp_path / "m", **change)), dtype="float32", context=context, threads=1) as llm:
        logits = llm.logits([PROMPTS[i]])[0][chosen(len(PROMPTS[i]))]
    assert error(logits, want.logits[i]) > 1e3 * EXACT


EACH = {case.config["model_type"]: name for name, case in reversed(CASES.items())}  # the first of each family
EVERYWHERE: dict[str, Any] = {  # fields that many families have, each with a value that no case has
    "rms_norm_eps": 0.3,
    "layer_norm_eps": 0.3,
    "layer_norm_epsilon": 0.3,
    "rope_theta": 7.0,
    "rotary_emb_base": 7.0,
    "hidden_act": "gelu",
    "hidden_activation": "silu",
    "activation": "silu",
    "activation_function": "silu",
    "num_experts_per_tok": 1,
}
COMMON = [
    *((name, field) for name in EACH.values() for field in EVERYWHERE if field in CASES[name].config),
    *((name, "rope_scaling") for name in EACH.values() if CASES[name].config["model_type"] != "gpt2"),
]


@pytest.mark.parametrize(("name", "field"), COMMON)
def test_what_many_families_have_acts_in_each(name: str, field: str, tmp_path: Path) -> None:
    want, own = expected(name), CASES[name].config.get(field)
    other = {**LINEAR, "factor": 16.0} if field == "rope_scaling" else EVERYWHERE[field]
    if other == own:
        other = "silu"
    folder = family_folder(name, tmp_path / "m", **{field: other})
    with LLM(str(folder), dtype="float32", context=SHORT if name in LONGROPE else 0, threads=1) as llm:
        logits = llm.logits([PROMPTS[1]])[0][chosen(LENGTHS[1])]
    assert error(logits, want.logits[1]) > 1e2 * EXACT


@pytest.mark.skipif(native.active() is None, reason="installed without a C++ compiler")
@pytest.mark.parametrize("name", CASES)
def test_the_native_stack_serves_every_family(name: str, folders: dict[str, Path]) -> None:
    model = load_model(folders[name], "float32", torch.device("cpu"))
    assert model.stack is not None
    assert {layer.ffn.layer.backend for layer in model.layers} == {"native"}


def test_there_is_a_case_for_every_family() -> None:
    assert {case.config["architectures"][0] for case in CASES.values()} == ARCHITECTURES.keys()


@pytest.mark.parametrize(("name", "one_by_one"), [*((name, False) for name in FILES), ("mixtral", True)])
def test_a_gguf_file_gives_the_logits_of_the_checkpoint(name: str, one_by_one: bool, tmp_path: Path) -> None:
    want, file = expected(name), family_file(name, tmp_path / "m.gguf", one_by_one=one_by_one)
    for context in (SHORT, LONG) if name in LONGROPE else (0,):
        with LLM(str(file), dtype="float32", context=context, threads=1) as llm:
            for i in lasting(name, context):
                logits = llm.logits([PROMPTS[i]])[0][chosen(len(PROMPTS[i]))]
                assert error(logits, want.logits[i]) < exact(name)


@pytest.mark.parametrize("name", [name for name in FILES if "kv_lora_rank" in CASES[name].config])
def test_a_newer_file_of_latent_attention_gives_the_same(name: str, tmp_path: Path) -> None:
    want, file = expected(name), family_file(name, tmp_path / "m.gguf", newer=True)
    with LLM(str(file), dtype="float32", threads=1) as llm:
        for i, logits in enumerate(llm.logits(PROMPTS)):
            assert error(logits[chosen(LENGTHS[i])], want.logits[i]) < ABSORBED


CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


@pytest.mark.parametrize(
    ("name", "said", "want"),
    [
        ("gemma2", (None, None), (50.0, 30.0)),  # the family's, as in files of before these fields
        ("gemma2", (20.0, None), (20.0, 30.0)),
        ("gemma2", (0.0, 0.0), (0.0, 0.0)),
        ("gemma3", (None, None), (0.0, 0.0)),
        ("gemma3", (None, 7.0), (0.0, 7.0)),
        ("gemma3", (5.0, 7.0), (5.0, 7.0)),
    ],
)
def test_the_bounds_of_a_file_are_what_it_names_or_the_familys(
    name: str, said: tuple[float | None, ...], want: tuple[float, ...], tmp_path: Path
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        for field, value in zip(CAPS, said, strict=True):
            writer.kv_data[-1].pop(f"{name}.{field}", None)
            if value is not None:
                writer.add_float32(f"{name}.{field}", value)

    config = open_source(family_file(name, tmp_path / "m.gguf", change)).config
    assert (config.attention_cap, config.logits_cap) == want


TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
SAID = [{"role": "user", "content": "w3"}]


@pytest.mark.parametrize("name", EACH.values(), ids=list(EACH))
def test_chat_templates_and_ends_of_text_come_along(name: str, tmp_path: Path) -> None:
    folder = family_folder(name, tmp_path / "model")
    words = {"<s>": 0} | {f"w{i}": i for i in range(1, 67)}
    Tokenizer(models.WordLevel(words, unk_token="w1")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w9"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "temperature": 0.1}))
    found = import_huggingface(folder, tmp_path / "out")
    assert found.eos_token_ids == load_config(tmp_path / "out").eos_token_ids == (5, 7, 9)
    for place in (folder, tmp_path / "out"):
        tokenizer = text.Tokenizer.load(place)
        assert tokenizer is not None and tokenizer.chat_template is not None
        assert tokenizer.chat_template.render(SAID) == "<s>w3"
    with LLM(str(tmp_path / "out"), dtype="float32", threads=1) as llm:  # what is written is the model that was read
        i = lasting(name, SHORT if name in LONGROPE else 0)[-1]
        assert error(llm.logits([PROMPTS[i]])[0][chosen(LENGTHS[i])], expected(name).logits[i]) < exact(name)


@pytest.mark.parametrize("name", [name for name in EACH.values() if name in FILES])
def test_the_chat_template_of_a_file_comes_along(name: str, tmp_path: Path) -> None:
    import_gguf(family_file(name, tmp_path / "m.gguf", lambda w: w.add_chat_template(TEMPLATE)), tmp_path / "out")
    tokenizer = text.Tokenizer.load(tmp_path / "out")
    assert tokenizer is not None and tokenizer.chat_template is not None
    assert tokenizer.chat_template.render(SAID) == "<s>w3"
    assert load_config(tmp_path / "out").eos_token_ids == (66,)


def test_the_page_of_models_has_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for name in ARCHITECTURES.keys() | FAMILIES.keys():
        assert f"`{name}`" in page
