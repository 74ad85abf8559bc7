"""Every setting by its name: where its value comes from, and what it means.

A flag beats the environment, the environment a file, a file the default. A name that is not a setting is an error.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin

import msgspec

from dsc_serve.config import API_KEYS, PREFIX, ConfigError, Section, ServerConfig, allowed_values, converted
from dsc_serve.documents import DocumentError, parse_toml, read_document


@dataclass(frozen=True)
class Setting:
    """One field of one section."""

    section: str  # its table in a file
    name: str
    kind: Any  # its annotated type
    default: Any

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def type(self) -> Any:
        return get_args(self.kind)[0]

    @property
    def many(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def description(self) -> str:
        return "".join(note.description for note in get_args(self.kind)[1:])

    def read(self, value: object, source: str) -> Any:
        """The value as the field holds it; what a variable holds is parsed. Raises ConfigError."""
        variable = source == self.variable
        parsed = items(str(value)) if variable and self.many else value
        try:
            return converted(parsed, self.kind, strict=not variable)
        except msgspec.ValidationError:
            message = f"{self.name} is {value!r}; it must be {allowed_values(self.kind)}"
            raise ConfigError(f"{source}: {message}") from None


def items(text: str) -> list[str]:
    """What stands between the commas of a variable."""
    return [item for part in text.split(",") if (item := part.strip())]


def settings_of(section: str, config: type[Section]) -> Iterator[Setting]:
    """The settings of one section; sections within it are not looked into."""
    defaults = config()
    for name, kind in config.kinds().items():
        if get_origin(kind) is Annotated:
            yield Setting(section, name, kind, getattr(defaults, name))


SECTIONS: dict[str, type[Section]] = {
    "server": ServerConfig,
    **{name: kind for name, kind in ServerConfig.kinds().items() if get_origin(kind) is not Annotated},
}
SETTINGS = {setting.name: setting for name, kind in SECTIONS.items() for setting in settings_of(name, kind)}


@dataclass
class Chosen:
    """Values by setting, and where each that is not a default comes from."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, value: object, source: str) -> None:
        self.values[name] = SETTINGS[name].read(value, source)
        self.sources[name] = source

    def config(self) -> ServerConfig:
        """Raises ConfigError where values do not go together."""
        parts: dict[str, Any] = {name: kind(**self._given(name)) for name, kind in SECTIONS.items() if name != "server"}
        return ServerConfig(**self._given("server"), **parts)

    def _given(self, section: str) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if SETTINGS[name].section == section}

    def toml(self) -> str:
        """All settings as a file that says the same, with the source of each value that is not a default."""
        lines: list[str] = []
        for section in SECTIONS:
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
            for setting in SETTINGS.values():
                if setting.section == section:
                    value = json.dumps(self.values.get(setting.name, setting.default), ensure_ascii=False)
                    source = self.sources.get(setting.name)
                    lines.append(f"{setting.name} = {value}" + (f"  # {source}" if source else ""))
        return "\n".join(lines) + "\n"


def choose(file: Path | None, environment: Mapping[str, str], flags: Mapping[str, object], source: str = "") -> Chosen:
    """Settings from a TOML file, PREFIX variables and flags (None: not given). Raises ConfigError.

    source: where what is given as flags comes from, if not from the command line.
    """
    chosen = Chosen()
    if file is not None:
        read_file(file, chosen)
    variables = {setting.variable: setting.name for setting in SETTINGS.values()}
    for variable, text in environment.items():
        if variable not in variables:
            unknown(variable, "environment", "a variable of this program", [*variables, API_KEYS])
        chosen.put(variables[variable], text, variable)
    for name, value in flags.items():
        if value not in (None, ()):
            chosen.put(name, value, source or SETTINGS[name].flag)
    return chosen


def read_file(file: Path, chosen: Chosen) -> None:
    try:
        document = parse_toml(read_document(file))
    except (OSError, DocumentError) as error:
        raise ConfigError(f"{file} cannot be read as TOML: {error}") from None
    for section, table in document.items():
        if section not in SECTIONS:
            unknown(section, str(file), "a section", SECTIONS)
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {section} is {table!r}; it must be a table of settings")
        names = [name for name, setting in SETTINGS.items() if setting.section == section]
        for name, value in table.items():
            if name not in names:
                unknown(name, str(file), f"a setting of [{section}]", names)
            chosen.put(name, value, str(file))


def unknown(name: str, source: str, what: str, known: Collection[str]) -> NoReturn:
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    raise ConfigError(f"{source}: {name} is not {what}; {hint}")


def document() -> str:
    """Every setting in Markdown."""
    lines = [
        "# Configuration",
        "",
        "Made by `dsc-serve settings`. A flag of `dsc-serve serve` beats the environment, the environment beats the",
        "file of `--config`, the file beats the default. The file is TOML with the sections below. A variable's name",
        f"is the setting's in capitals after `{PREFIX}` (lists: commas between). An unknown name is an error.",
        "`dsc-serve serve --print-config` prints what holds, as such a file, with the source of every value.",
        "",
        f"API keys come from `key_file` or from the variable `{API_KEYS}`, as `NAME:KEY,NAME:KEY`, each",
        "of at least 16 characters; `dsc-serve key NAME` makes one. Those of the variable have the settings' limits",
        "and do not open `/admin/…`. In the file each has a table, which that command prints, too. Beside",
        "`sha256`, the key's hash, it may have `weight` and `priority`, for the policies `fair` and `priority` (a",
        "request can only make itself less urgent than its key); `streams`, `requests_per_minute` and",
        "`tokens_per_minute` (0: no limit; left out: as in `[limits]`); `cache_salt`, to share cached prefixes only",
        "with keys of the same salt; `adapters`, the only models that it may use and see (adapters.md); `admin`, which",
        "opens `/admin/state` and `/admin/tenants`. The file is read again when it has changed",
        "and been left alone for two seconds; while it cannot be used, the keys that it last held stay valid. Two",
        "names with one key are an error. Tokens a minute are set aside before a request begins: its prompt and its",
        "largest output.",
    ]
    for section, config in SECTIONS.items():
        lines += ["", f"## [{section}]", "", (config.__doc__ or "").split("\n")[0], ""]
        lines += ["| setting | flag | default | allowed | meaning |", "|---|---|---|---|---|"]
        for setting in SETTINGS.values():
            if setting.section == section:
                cells = (f"`{setting.name}`", f"`{setting.flag}`", f"`{json.dumps(setting.default)}`")
                lines.append(f"| {' | '.join(cells)} | {allowed_values(setting.kind)} | {setting.description} |")
    return "\n".join(lines) + "\n"
