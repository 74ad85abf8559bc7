"""What a comparison compares: systems, loads and limits, from a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from dsc_serve.bench.load.summary import LIMITED
from dsc_serve.documents import DocumentError, parse_toml, read_document

FOLDER = Path(__file__).parent / "comparisons"
LEAST_REQUESTS = 12  # of a measurement: a few at one stream are over before they say anything
COUNT = Annotated[int, Meta(ge=1)]
POSITIVE = Annotated[float, Meta(gt=0)]

FfnKind = Literal["dsc", "moe", "molora", "dense"]
Form = Literal["mixtral", "llama"]
PresetName = Literal["paper", "large", "olmoe", "granite", "qwen"]
MIXTURES: tuple[PresetName, ...] = (
    "olmoe",
    "granite",
    "qwen",
)  # presets at which a DSC is equal to the mixture in one way only
GROUPS = {  # comparisons that one name stands for
    "mixture": tuple(f"mixture-{name}" for name in MIXTURES),
    "quantised": ("quantised-paper", "quantised-large"),
}


class ComparisonError(ValueError):
    """A comparison that cannot be run as asked; one line that says why."""


class ComparedSystem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server. Ours where there is no `command`."""

    name: str
    ffn: FfnKind | None = None  # kind of a made model of ours
    form: Form | None = None  # of a made model of another server's
    # at a preset that is a mixture of experts, which parameters of a DSC are as many as its
    equal: Literal["total", "active"] | None = None
    folder: str = ""  # the model to serve; empty: one of random weights is made at the comparison's preset
    settings: dict[str, str | int | float | bool] = {}  # flags of `dsc-serve serve`, by their names
    # how another server is started; {folder}, {port} and {threads} in it are filled in. It is skipped where its program
    # is not installed
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # added to this process's own
    models: tuple[str, ...] = ()  # the names to ask for, in turn; none: the first that the server lists
    ignore_eos: bool = True  # ask for all output tokens; false for a server that does not know the field
    weights: str = "random"  # what to say of them in the report

    @property
    def ours(self) -> bool:
        return not self.command


class Expectation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A ratio of one system's figure to another's that is demanded at a number of streams."""

    subject: str
    against: str
    figure: str
    streams: int
    at_most: float | None = None
    at_least: float | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Systems under the same loads."""

    title: str
    subject: str  # with the baseline, the systems that the text compares first
    baseline: str
    system: tuple[ComparedSystem, ...]
    preset: PresetName = "paper"  # sizes of models that are made
    threads: Annotated[int, Meta(ge=0)] = 0
    prompt_tokens: COUNT = 48
    output_tokens: COUNT = 64
    temperature: Annotated[float, Meta(ge=0)] = 0.0  # of all requests; 0 is greedy
    prompt_file: str = ""  # as in `bench serve`; without it prompts are random ids below vocab_size
    tokenizer: str = ""  # as in `bench serve`
    vocab_size: COUNT = 50000
    streams: tuple[COUNT, ...] = (1, 8, 16, 32)  # closed loops
    waves: COUNT = 3  # requests of each stream in a round, at least LEAST_REQUESTS together
    rounds: COUNT = 5  # of all systems in turn
    # open loads, as multiples of the most requests per second that the baseline completed in its closed loops
    rates: tuple[POSITIVE, ...] = ()
    rate_seconds: POSITIVE = 5.0  # of each
    limits: dict[str, float] = {}  # in milliseconds, which a request must keep to count in goodput
    sizes: bool = False  # whether each system's parameters are said beside its name in every table
    profiled: tuple[COUNT, ...] = ()  # numbers of running requests at which a step of ours is taken apart; empty: none
    seed: int = 0
    start_timeout_s: POSITIVE = 600.0
    request_timeout_s: POSITIVE = 120.0
    expect: tuple[Expectation, ...] = ()

    def __post_init__(self) -> None:
        names = [system.name for system in self.system]
        if len(names) != len(set(names)):
            raise ComparisonError(f"system names are {', '.join(names)}; each must be there once")
        references = {"subject": self.subject, "baseline": self.baseline}
        for i, wanted in enumerate(self.expect):
            references |= {f"expect[{i}].subject": wanted.subject, f"expect[{i}].against": wanted.against}
            if (wanted.at_most is None) == (wanted.at_least is None):
                raise ComparisonError(f"expect[{i}] needs one of at_most and at_least")
            if wanted.streams not in self.streams:
                raise ComparisonError(f"expect[{i}].streams is {wanted.streams}; it must be one of {self.streams}")
        for field, name in references.items():
            if name not in names:
                raise ComparisonError(f"{field} is {name!r}; it must be one of {', '.join(names)}")
        for system in self.system:
            if not system.folder and (system.ffn is None) == (system.form is None):
                raise ComparisonError(f"system {system.name!r} needs a folder, or one of ffn and form")
            if not system.ours and system.settings:
                raise ComparisonError(f"system {system.name!r} has settings, which are of our own server; use command")
            if (system.equal is not None) != (self.preset in MIXTURES and system.ffn == "dsc" and not system.folder):
                raise ComparisonError(
                    f"system {system.name!r}: equal is {system.equal!r}; it must be total or active for ffn 'dsc' at "
                    f"a preset of {', '.join(MIXTURES)}, and left out else"
                )
            if self.preset in MIXTURES and not system.folder and system.ffn not in ("moe", "dsc"):
                raise ComparisonError(f"system {system.name!r} must be moe or dsc, which preset {self.preset!r} has")
            if system.ours and system.form is not None:
                raise ComparisonError(f"system {system.name!r} has a form but no command to serve it")
        for name in self.limits:
            if name not in LIMITED:
                raise ComparisonError(f"limits.{name} is not known; it must be one of {', '.join(LIMITED)}")

    def only(self, names: tuple[str, ...]) -> Comparison:
        """The same without the systems that are not named. Raises ComparisonError for a name that is unknown."""
        known = [system.name for system in self.system]
        for name in names:
            if name not in known:
                raise ComparisonError(f"system {name!r} is not in this comparison; it has {', '.join(known)}")
        kept = tuple(system for system in self.system if system.name in names)
        wanted = tuple(e for e in self.expect if {e.subject, e.against} <= set(names))
        return msgspec.structs.replace(self, system=kept, expect=wanted)


def included() -> list[str]:
    """The names of the comparisons that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def members(name: str) -> tuple[str, ...]:
    """The comparisons that a name stands for, mostly itself alone."""
    return GROUPS.get(name, (name,))


def load_comparison(name: str) -> Comparison:
    """A comparison that comes with the package, or one's own file. Raises ComparisonError in one line."""
    path = FOLDER / f"{name}.toml" if name in included() else Path(name)
    try:
        text = read_document(path)
    except (OSError, DocumentError) as error:
        allowed = ", ".join((*included(), *GROUPS))
        raise ComparisonError(f"comparison {name!r} cannot be read: {error}; it must be a file or {allowed}") from None
    try:
        content = parse_toml(text)
    except DocumentError as error:
        raise ComparisonError(f"{path} is not TOML: {error}") from None
    try:
        return msgspec.convert(content, Comparison)
    except msgspec.ValidationError as error:
        raise ComparisonError(f"{path}: {error}") from None
