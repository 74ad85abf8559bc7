"""The call forms, and which of them a model was taught."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from dsc_serve.server.tools import generic, granite, hermes, llama3, mistral
from dsc_serve.server.tools.form import CallForm
from dsc_serve.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class RegisteredForm:
    """A form of calls that is known."""

    make: Callable[[str], CallForm]  # the form for a template
    # Whether a template and the special tokens' texts show that it is this
    fits: Callable[[str, Collection[str]], bool]


FALLBACK = "json"
# Those with marks that no other form has go first.
FORMS: Mapping[str, RegisteredForm] = {
    "mistral": RegisteredForm(mistral.form, mistral.fits),
    "granite": RegisteredForm(granite.form, granite.fits),
    "hermes": RegisteredForm(hermes.form, hermes.fits),
    "llama3": RegisteredForm(llama3.form, llama3.fits),
    "json": RegisteredForm(generic.form, generic.fits),
}


def chosen(setting: str, template: str, special: Collection[str]) -> CallForm:
    """The form that a setting names; `auto`: the one that the template or the tokenizer's special tokens show."""
    if setting != "auto":
        return FORMS[setting].make(template)
    for signs in ((), special):  # a template says more than a token that the vocabulary has for other models
        for name, member in FORMS.items():
            if name != FALLBACK and member.fits(template, signs):
                return member.make(template)
    return FORMS[FALLBACK].make(template)


def form_of(setting: str, tokenizer: Tokenizer | None) -> CallForm:
    """The form of a served model."""
    if tokenizer is None:
        return FORMS[FALLBACK].make("")
    template = "" if tokenizer.chat_template is None else tokenizer.chat_template.source
    return chosen(setting, template, tokenizer.special_texts)
