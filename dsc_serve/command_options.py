"""Options of the command line for the settings of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from dsc_serve.settings import SETTINGS, Setting

F = TypeVar("F", bound=Callable[..., Any])


def options_of(*sections: str, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Options for all settings of these sections; those not given are None, or empty where several may be."""

    def decorate(command: F) -> F:
        for setting in reversed(SETTINGS.values()):
            if setting.section in sections and setting.name not in without:
                command = option_of(setting)(command)
        return command

    return decorate


def option_of(setting: Setting) -> Callable[[F], F]:
    described = f"{setting.description.rstrip('.')}."
    if setting.type is bool:
        return click.option(f"{setting.flag}/{setting.flag.replace('--', '--no-', 1)}", default=None, help=described)
    if setting.default not in ("", ()):
        described += f"  [default: {setting.default}]"
    choices = get_args(setting.type) if get_origin(setting.type) is Literal else ()
    kind: Any = click.Choice(choices) if choices else str if setting.many else setting.type
    return click.option(setting.flag, type=kind, multiple=setting.many, default=None, help=described)


engine_options = options_of("engine", without=("model",))


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


class ServeCommand(click.Command):
    """Shows the options by the sections of the configuration."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            setting = SETTINGS.get(parameter.name or "")
            if record is not None:
                groups.setdefault(setting.section if setting else "options", []).append(record)
        for name, records in groups.items():
            with formatter.section(name.capitalize()):
                formatter.write_dl(records)
