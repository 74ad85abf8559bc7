"""Typed settings of the engine and of the server; the only place that reads the environment.

Each field carries its meaning and its bounds; `settings` reads fields from files, the environment and flags, and
documents them. Names are unique over all sections, so that flags and variables need no section.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from dsc_serve.addresses import wrong_origin, wrong_root_path
from dsc_serve.life_settings import LifeConfig as LifeConfig
from dsc_serve.life_settings import LogConfig as LogConfig
from dsc_serve.limit_settings import LimitConfig as LimitConfig
from dsc_serve.section import MOST as MOST
from dsc_serve.section import ConfigError as ConfigError
from dsc_serve.section import Section as Section
from dsc_serve.section import allowed_values as allowed_values
from dsc_serve.section import converted as converted
from dsc_serve.section import served_names
from dsc_serve.weight_forms import KeepError, kept

DTYPES = {"auto": "auto", "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
EMBEDDED_MODEL = "dsc-tiny"
# Two underscores: the variables that Kubernetes makes of a service named dsc-serve, such as DSC_SERVE_PORT, have one.
PREFIX = "DSC_SERVE__"
API_KEYS = f"{PREFIX}API_KEYS"
# What goes with tensor_parallel above 1: rounding would cut groups of numbers, the others are made for one whole model.
ALLOWED_SHARED: dict[str, tuple[str, ...]] = {
    "weights": ("auto", "stored", "bfloat16"),
    "keep": ("",),
    "router_precision": ("auto", "exact"),
    "grouping": ("auto", "off"),
    "draft_model": ("",),
    "adapters": ("",),
}


class EngineConfig(Section, frozen=True, kw_only=True):
    """What one engine needs to know. Sizes are counts of tokens, sequences or blocks."""

    model: Annotated[
        str, Meta(description="Folder of this server's or of Hugging Face's form, GGUF file, or embedded model's name.")
    ] = EMBEDDED_MODEL
    context: Annotated[
        int,
        Meta(ge=0, le=2**30, description="Most tokens of a prompt and its output; 0: as many as the model is for."),
    ] = 0
    dtype: Annotated[
        Literal["auto", "float32", "fp32", "bfloat16", "bf16"],
        Meta(description="Compute in this dtype; auto: as stored (float16: bfloat16), where the device is fast in it."),
    ] = "auto"
    weights: Annotated[
        Literal["auto", "stored", "bfloat16", "int8", "int4"],
        Meta(
            description="Hold weights so: stored: as they are, quantised ones too; auto: the same, but GGUF files "
            "dequantised where dtype is float32; bfloat16: none quantised, in the dtype; int8, int4: what takes more "
            "bits is rounded at load, by sane parts (quantisation.md)."
        ),
    ] = "auto"
    keep: Annotated[
        str,
        Meta(
            description="Exceptions by parts, such as router,head=int8; a part alone stays as stored. Parts: "
            "embedding, head, attention, mlp, experts, router, bank."
        ),
    ] = ""
    activations: Annotated[
        Literal["int16", "int8"],
        Meta(description="Round inputs of quantised products so (on CPUs); int8: faster for many, and logits move."),
    ] = "int16"
    kv_dtype: Annotated[
        Literal["auto", "int8"],
        Meta(
            description="Hold keys and values so; auto: in dtype; int8: each token's of a head with a scale (on CPUs)."
        ),
    ] = "auto"
    device: Annotated[Literal["cpu", "cuda"], Meta(description="Run here.")] = "cpu"
    threads: Annotated[int, Meta(ge=0, le=1024, description="Compute threads; 0: all cores.")] = 0
    tensor_parallel: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Share each layer between so many GPUs, or processes on the CPU, of this host (scale.md).",
        ),
    ] = 1
    max_running: Annotated[int, Meta(ge=1, le=2**14, description="Most requests in one step.")] = 64
    step_tokens: Annotated[
        int, Meta(ge=1, le=2**20, description="Most tokens computed in one step; longer prompts take several.")
    ] = 512
    block_size: Annotated[int, Meta(ge=1, le=2**12, description="Tokens in one KV block.")] = 16
    kv_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=MOST,
            description="Tokens the KV pool holds; 0: full contexts for all, within a fifth of free memory (GPU: 4/5).",
        ),
    ] = 0
    policy: Annotated[
        str, Meta(description="Who is computed when: fcfs, bursts, affinity, shortest-prefill, priority or fair.")
    ] = "fcfs"
    itl_target_ms: Annotated[
        float,
        Meta(
            ge=0,
            le=60_000,
            description="Prompts are cut so that a running request gets a token so often; 0: in 1.6 times a step "
            "without prompts, at least 6 ms.",
        ),
    ] = 0.0
    prefix_cache: Annotated[bool, Meta(description="Reuse what prompts with the same beginning have computed.")] = True
    kernels: Annotated[
        str,
        Meta(description="Kernels: auto, plain (torch alone), triton, or an instruction set of the CPU such as avx2."),
    ] = "auto"
    router_precision: Annotated[
        Literal["auto", "exact", "int8-certified"],
        Meta(
            description="How DSC's router is scored: exact, or int8-certified, which screens it in int8 and picks the "
            "same; auto: what is faster on a CPU, exact on a GPU."
        ),
    ] = "auto"
    head_precision: Annotated[
        Literal["auto", "exact", "int8-certified"],
        Meta(
            description="How greedy decoding finds the likeliest token: exact, or int8-certified, which screens the "
            "head in int8 and finds the same; auto: what is faster."
        ),
    ] = "auto"
    speculation: Annotated[
        Literal["auto", "off"],
        Meta(
            description="auto: tokens that may follow are computed with a request's own where that is expected to pay; "
            "the answers stay the same."
        ),
    ] = "off"
    max_drafts: Annotated[
        int, Meta(ge=1, le=64, description="Most of these for one request in a step, with speculation auto.")
    ] = 7
    draft_model: Annotated[
        str, Meta(description="A smaller model with the same tokens, which drafts with speculation auto; empty: none.")
    ] = ""
    grammar_timeout_s: Annotated[
        float, Meta(ge=0.1, le=60, description="Seconds to compile a structured output's grammar; beyond it: 400.")
    ] = 2.0
    grammar_memory_mb: Annotated[
        int, Meta(ge=16, le=65536, description="MiB that one grammar may take, compiled and followed.")
    ] = 192
    grammars_memory_mb: Annotated[
        int, Meta(ge=16, le=65536, description="MiB of all grammars together; the unused go first, then the largest.")
    ] = 512
    pooling: Annotated[
        Literal["auto", "last", "mean"],
        Meta(
            description="How a text's hidden states become its embedding: the last token's, or their mean; auto: as "
            "the checkpoint's own files say, else last."
        ),
    ] = "auto"
    grouping: Annotated[
        Literal["auto", "always", "off"],
        Meta(description="Compose a step's tokens in an order in which neighbours share atoms; auto: where it pays."),
    ] = "auto"
    graphs: Annotated[
        int,
        Meta(ge=1, le=512, description="On a GPU, most steps captured as graphs at start; none with tensor_parallel."),
    ] = 64
    graph_mb: Annotated[
        int, Meta(ge=1, le=2**20, description="MiB that these may take, estimated; larger steps then run without one.")
    ] = 512
    graph_capture_s: Annotated[
        float, Meta(ge=0, le=3600, description="Seconds of capturing after which no further one is begun.")
    ] = 60.0
    step_ahead: Annotated[
        Literal["auto", "off"],
        Meta(
            description="auto: on a GPU each step is launched before the last one's tokens are read (engine.md), "
            "without tensor_parallel."
        ),
    ] = "auto"
    dependent_launch: Annotated[
        Literal["auto", "off"], Meta(description="auto: on NVIDIA's 9.0 and later kernels begin while the last ends.")
    ] = "auto"
    adapters: Annotated[str, Meta(description="Folder of adapters, one in each sub-folder; watched.")] = ""
    adapter_bytes: Annotated[
        int, Meta(ge=2**10, le=MOST, description="Bytes of adapters in memory; the least recently used go.")
    ] = 2**28

    @property
    def drafts(self) -> int:
        """Most drafts of one request in a step."""
        return 0 if self.speculation == "off" else self.max_drafts

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft_model and self.speculation == "off":
            raise ConfigError(f"draft_model is {self.draft_model!r} but speculation is 'off'; it must be 'auto'")
        try:
            kept(self.keep)
        except KeepError as error:
            raise ConfigError(str(error)) from None
        if self.step_tokens < self.max_running:
            raise ConfigError(
                f"step_tokens is {self.step_tokens} but max_running is {self.max_running}; a step must have room for "
                "one token of every running request: raise step_tokens or lower max_running"
            )
        self._check_shared()

    def _check_shared(self) -> None:
        """Raises ConfigError for what cannot be had where ranks share a model."""
        for name, allowed in ALLOWED_SHARED.items() if self.tensor_parallel > 1 else ():
            value = getattr(self, name)
            if value not in allowed:
                what = f"{name} is {value!r} but tensor_parallel is {self.tensor_parallel}"
                raise ConfigError(f"{what}; allowed with it: {', '.join(map(repr, allowed))}")


class AccessConfig(Section, frozen=True, kw_only=True):
    """Who may ask."""

    key_file: Annotated[
        str, Meta(description="TOML file of API keys, read again when it changes; `dsc-serve key` makes entries.")
    ] = ""
    metrics_key: Annotated[bool, Meta(description="/metrics needs a key too.")] = False
    cors_origins: Annotated[
        tuple[str, ...], Meta(description="Origins whose web pages may call the API, such as https://chat.example.")
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := wrong_origin(self.cors_origins):
            raise ConfigError(wrong)


class ServerConfig(Section, frozen=True, kw_only=True):
    """Where the HTTP server listens and what it serves, with all the sections."""

    host: Annotated[str, Meta(description="Listen on this address.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Listen on this port; 0 picks a free one.")] = 8000
    served_model_name: Annotated[
        str, Meta(description="The model's name in the API, or several with commas between; empty: its folder's.")
    ] = ""
    root_path: Annotated[
        str, Meta(description="Path of this server behind a proxy, such as /llm; requests may come with it or without.")
    ] = ""
    page: Annotated[bool, Meta(description="Serve a page for people at /; it needs no key, its calls do.")] = True
    tool_calls: Annotated[
        Literal["auto", "hermes", "llama3", "mistral", "granite", "json"],
        Meta(description="How the model writes calls of tools; auto: as its chat template and its tokens show."),
    ] = "auto"
    tls_cert: Annotated[str, Meta(description="PEM file of the server's certificate chain; with it, HTTPS.")] = ""
    tls_key: Annotated[str, Meta(description="PEM file of the certificate's private key.")] = ""
    escape_special_tokens: Annotated[
        bool,
        Meta(
            description="Encode special tokens that a chat's texts spell as text, so that no client can write the "
            "template's marks."
        ),
    ] = False
    engine: EngineConfig = EngineConfig()
    limits: LimitConfig = LimitConfig()
    access: AccessConfig = AccessConfig()
    life: LifeConfig = LifeConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        served_names(self.served_model_name)
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError(
                f"tls_cert is {self.tls_cert!r} but tls_key is {self.tls_key!r}; it takes both or neither"
            )
        if wrong := wrong_root_path(self.root_path):
            raise ConfigError(wrong)

    @property
    def served_names(self) -> tuple[str, ...]:
        return served_names(self.served_model_name)


def generation_slots(config: ServerConfig) -> int:
    """Generations that the server holds, running and queued."""
    return config.engine.max_running + (config.limits.max_waiting or config.engine.max_running)


def environment() -> dict[str, str]:
    """The variables that are meant for this program, without those of API keys."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and name != API_KEYS}


def environment_keys() -> str:
    """API keys given by the environment, as NAME:KEY,NAME:KEY."""
    return os.environ.get(API_KEYS, "")


def calibration_file() -> Path:
    """Where `dsc-serve kernels calibrate` keeps what it measured: in the user's cache folder.

    Raises ConfigError where the user has none, as in a container that runs as some number.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "dsc-serve" / "calibration.json"
    except RuntimeError:
        raise ConfigError("this user has no home folder; set XDG_CACHE_HOME to keep calibrations there") from None


def models_folder() -> Path:
    """The folder of the models that ship with the package."""
    return Path(__file__).parent / "models"


def resolve_model(name_or_path: str) -> Path:
    """The model folder or file for a path, or the folder of an embedded model for its name.

    Raises ConfigError when neither exists, naming the embedded models.
    """
    path = Path(name_or_path)
    if path.is_dir() or path.is_file():
        return path
    embedded = models_folder() / name_or_path
    if "/" not in name_or_path and embedded.is_dir():
        return embedded
    names = sorted(p.name for p in models_folder().iterdir() if p.is_dir()) if models_folder().is_dir() else []
    kinds = "neither a folder, a file nor an embedded model"
    raise ConfigError(f"model {name_or_path!r} is {kinds}; embedded: {', '.join(names) or 'none'}")


def child_environment() -> dict[str, str]:
    """Environment of a process that has no use for API keys."""
    return {name: value for name, value in os.environ.items() if name != API_KEYS}


def engine_environment(threads: int) -> dict[str, str]:
    """Environment of an engine process with `threads` compute threads. Must be set before torch loads.

    OpenMP threads that spin at barriers for long slow down many times over when another process, such as the API
    server, wants their core; threads that sleep at once wake too slowly for layers of 100 µs. So they spin for some
    microseconds and then sleep; `docs/kernels.md` has the figures.
    """
    env = child_environment()
    env.setdefault("OMP_NUM_THREADS", str(threads))
    env.setdefault("GOMP_SPINCOUNT", "3000")
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


def grammar_environment() -> dict[str, str]:
    """Environment of the process that forks others for grammars: nothing in it may start a thread by itself."""
    env = {name: value for name, value in os.environ.items() if name != API_KEYS}
    return env | {
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",  # else a thread takes address space that counts as memory
    }
