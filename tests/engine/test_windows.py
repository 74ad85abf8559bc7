"""Layers that see a window hold the window: blocks behind it are given back, and nothing that is asked for changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fake_runner import alone, fake_engine
from support.families import CASES, PROMPTS, family_folder

from dsc_serve import LLM, SamplingParams
from dsc_serve.engine.engine import Engine
from dsc_serve.kv_layout import KvLayout
from dsc_serve.model.architectures import Settings, architecture_of
from dsc_serve.model.config import ModelConfig, checked_config
from dsc_serve.model.layer_groups import group_layers, layer_groups

WINDOWED, MIXED = "mistral with a window", "gemma2"
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def serve(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> tuple[list[int], int]:
    """The tokens that follow, and those of the prompt that were found."""
    tokens, cached = [], 0
    engine.add("x", prompt, params)
    while engine.has_work:
        for delta in engine.step():
            tokens += delta.token_ids
            cached = delta.cached_tokens
    return tokens, cached


def held(engine: Engine) -> int:
    return max((len(request.blocks) for request in engine.scheduler.running.values()), default=0)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_text_of_many_windows_never_holds_more_than_its_window_and_a_chunk(size: int) -> None:
    engine = fake_engine(40, size, step_tokens=5, max_running=2, context=200, windows=(4,))
    most = KvLayout(size, (4,)).most_blocks(200, 5)
    assert engine.capacity.max_tokens == 200 and most < 200 // size // 2
    prompt = [i % 29 for i in range(60)]
    engine.add("x", prompt, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for delta in engine.step() for token in delta.token_ids]
        assert held(engine) <= most
    assert tokens == alone(prompt, 100, ())


def test_a_pool_that_holds_a_window_serves_any_length_and_says_what_it_cannot() -> None:
    layout = KvLayout(4, (8,))
    least = layout.most_blocks(10**6, 16)
    assert fake_engine(least, 4, 16, context=5000, windows=(8,)).capacity.max_tokens == 5000
    assert fake_engine(least - 1, 4, 16, context=5000, windows=(8,)).capacity.max_tokens == 4 * (least - 1)
    mixed = fake_engine(40, 4, 16, context=5000, windows=(0, 8))
    longest = mixed.capacity.max_tokens
    sizes = [KvLayout(4, (0, 8)).most_blocks(tokens, 16) for tokens in (longest, longest + 1)]
    assert sizes[0] <= 40 < sizes[1]
    tokens, _ = serve(mixed, [i % 29 for i in range(longest - 4)])
    assert tokens == alone([i % 29 for i in range(longest - 4)], 4, ())


def test_a_prefix_is_found_by_what_is_seen_from_its_end_alone() -> None:
    prompt = [i % 29 for i in range(41)]
    engine = fake_engine(8, 4, 8, context=64, windows=(5,))
    first, cached = serve(engine, prompt)
    assert cached == 0 and first == alone(prompt, 4, ())
    # The pool is smaller than the prompt: its beginning is forgotten, what its end needs is not.
    second, cached = serve(engine, prompt)
    assert (second, cached) == (first, 40)
    engine.add("y", prompt, GREEDY)
    request = engine.scheduler.get("y")
    assert request is not None
    pool, names = engine.scheduler.pool, request.block_hashes
    assert pool.find(names[0]) is None and pool.find(names[9]) is not None
    pool.withdraw(names[9])  # which the end at 40 needs, but not that at 36
    engine.step()
    assert (request.cached_tokens, request.num_computed) == (36, 41)


def test_a_prefix_is_no_longer_than_every_group_of_layers_has_it() -> None:
    prompt = [i % 29 for i in range(25)]
    engine = fake_engine(60, 4, 32, context=64, windows=(0, 6))
    serve(engine, prompt)
    engine.add("y", prompt, GREEDY)
    request = engine.scheduler.get("y")
    assert request is not None
    found = engine.scheduler.pool.find(request.block_hashes[5], 1)
    assert found is not None
    engine.scheduler.pool._published.pop(engine.scheduler.pool._hashes[found] or b"")
    engine.step()
    assert request.cached_tokens == 20


@pytest.mark.parametrize("name", [WINDOWED, MIXED])
@pytest.mark.parametrize("size", [1, 4])
def test_a_model_says_the_same_in_a_pool_of_little_more_than_its_windows(name: str, size: int, tmp_path: Path) -> None:
    """With prompts in chunks, in company, preempted, and once more from the prefix cache."""
    folder = str(family_folder(name, tmp_path / "m"))
    prompts = [PROMPTS[2], PROMPTS[1], PROMPTS[2][:30]]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(folder, dtype="float32", block_size=8, threads=1) as llm:
        want = [output.token_ids for output in llm.generate(prompts, params)]
    kv_tokens = 28 if name == WINDOWED else 48
    with LLM(
        folder, dtype="float32", block_size=size, kv_tokens=kv_tokens, step_tokens=8, max_running=4, threads=1
    ) as llm:
        for _ in range(2):
            assert [output.token_ids for output in llm.generate(prompts, params)] == want
        assert llm.engine.scheduler.preemptions > 0 or name == WINDOWED
        assert llm.engine.scheduler.cached_tokens > 0


@pytest.mark.parametrize("name", [WINDOWED, MIXED, "deepseek2"])
def test_drafts_change_nothing(name: str, tmp_path: Path) -> None:
    folder = str(family_folder(name, tmp_path / "m"))
    prompt = PROMPTS[2]
    with LLM(folder, dtype="float32", block_size=2, threads=1) as llm:
        (want,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=18, ignore_eos=True))
    predicted = [*want.token_ids[:7], 1, *want.token_ids[8:]]
    asked = SamplingParams(temperature=0, max_tokens=18, ignore_eos=True, prediction_token_ids=predicted)
    with LLM(folder, dtype="float32", block_size=2, speculation="auto", max_drafts=4, threads=1) as llm:
        (got,) = llm.generate([prompt], asked)
        assert llm.engine.scheduler.fault() is None
    assert got.token_ids == want.token_ids


def test_groups_of_layers_are_of_one_size_and_waste_little() -> None:
    six = group_layers([512, 512, 512, 512, 512, 0] * 4 + [512, 512], 32768)
    assert six.windows == (0, 512, 512, 512, 512, 512, 512) and six.size == 4
    assert group_layers([8] * 3, 64).windows == (8,)
    assert group_layers([64, 8], 64).windows == (0, 8)  # no text is longer: it sees all
    assert group_layers([0] * 7, 64).windows == (0,)
    places = list(zip(six.group, six.place, strict=True))
    assert len(set(places)) == len(places) and max(six.place) < six.size


GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "rms_norm_eps": 1e-6,
}


def config_of(content: dict[str, object]) -> ModelConfig:
    settings = Settings(content, Path("config.json"))
    return checked_config(architecture_of(settings).fields(settings), "config.json")


def kv_bytes(config: ModelConfig, tokens: int, element: int = 2) -> tuple[int, int]:
    """What a context takes when it is whole, and what it would with full attention in all layers."""
    groups, size = layer_groups(config), 16
    blocks = KvLayout(size, groups.windows).most_blocks(tokens, 1)
    per_token = config.cached_size * element
    return blocks * size * groups.size * per_token, tokens * config.num_hidden_layers * per_token


def test_what_gemma_keeps_of_4096_tokens() -> None:
    """Of 26 layers 4 keep all and 22 a window of 512: 28 MiB in place of 104."""
    held, whole = kv_bytes(config_of(GEMMA3_1B), 4096)
    assert (whole, held) == (109051904, 29753344)


def test_what_a_latent_context_takes() -> None:
    """576 numbers a token and layer, where 16 heads of 192 and 128 would be 5,120."""
    lite = CASES["deepseek2"].config | {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    assert config_of(lite).cached_size == 576


def test_the_blocks_of_a_long_context_are_as_few_as_is_said(tmp_path: Path) -> None:
    folder = str(family_folder(MIXED, tmp_path / "m", max_position_embeddings=2100, sliding_window=64))
    prompt = [(7 * i * i + 3) % 67 for i in range(2048)]
    with LLM(folder, dtype="float32", block_size=16, threads=1) as llm:
        engine = llm.engine
        assert engine.capacity.kv_windows == (0, 64)
        engine.add("x", prompt, GREEDY)
        while not (news := engine.step()):
            pass
        (request,) = engine.scheduler.running.values()
        assert news[0].token_ids and len(request.blocks) == 2048 // 16 + 64 // 16
        engine.finish("x")
