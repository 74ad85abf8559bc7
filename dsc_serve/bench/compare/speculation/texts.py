"""What drafts are worth in real work: one stream of a model that has learned to speak, decoding alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from dsc_serve.bench.compare.comparison import ComparisonError
from dsc_serve.bench.compare.speculation.found import SpeculationResults, TextRow
from dsc_serve.config import EngineConfig, resolve_model
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer

CHANGED_EVERY = 20  # words of a prediction, of which one is another than the answer's
CHANGED = "otherwise"
LEAST_TOKENS = 16  # of an answer that says anything
TOKENS = 192

LETTER = """Dear Mr Hollis,

Thank you for your letter of the third of March about the footbridge at Mill Lane. We have looked at it together with
our engineer, Ms Okafor, who found that two of the seven beams are rotten and that the handrail on the eastern side has
come loose. The bridge will be closed from the first of April, and we expect to open it again in the middle of June. In
the meantime people can cross the river at the road bridge in Station Street, about four hundred metres downstream. The
work will cost about eighteen thousand pounds, half of which the county will pay. If you have further questions, please
call our office on weekdays between nine and noon.

Yours sincerely,
Ruth Bellamy"""

LIST = """Order 1041: name Anna Petrova, city Sofia, 3 lamps at 49 euros each.
Order 1042: name Tomas Lindgren, city Uppsala, 12 chairs at 85 euros each.
Order 1043: name Maria Oliveira, city Porto, 1 desk at 320 euros each.
Order 1044: name Kenji Watanabe, city Osaka, 7 shelves at 64 euros each."""

ORDER = {
    "type": "object",
    "properties": {
        "order_number": {"type": "integer", "minimum": 1, "maximum": 9999},
        "customer_name": {"type": "string", "maxLength": 40},
        "customer_city": {"type": "string", "maxLength": 30},
        "article": {"type": "string", "maxLength": 20},
        "number_of_pieces": {"type": "integer", "minimum": 1, "maximum": 99},
        "price_in_euros": {"type": "integer", "minimum": 1, "maximum": 9999},
    },
    "required": [
        *("order_number", "customer_name", "customer_city", "article", "number_of_pieces", "price_in_euros"),
    ],
    "additionalProperties": False,
}
ORDERS = {
    "type": "object",
    "properties": {"orders": {"type": "array", "items": ORDER, "minItems": 4, "maxItems": 4}},
    "required": ["orders"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class TextTask:
    """One request, greedy."""

    name: str
    message: str
    begins: str = ""  # what the answer has been given already
    shape: StructuredOutputs | None = None
    predicted: bool = False  # whether its own answer is given as a prediction, with words of it changed
    tokens: int = TOKENS


TASKS = (
    TextTask(
        "editing a given text, its own answer as prediction",
        f"Correct the mistakes in this letter and change nothing else:\n\n{LETTER}",
        predicted=True,
    ),
    TextTask(
        "a text that repeats its prompt",
        f"Repeat this letter word for word:\n\n{LETTER}",
        begins=LETTER[: LETTER.index(" about the footbridge")],
    ),
    TextTask(
        "JSON extracted by schema",
        f"Write these four orders as JSON:\n\n{LIST}",
        shape=StructuredOutputs(json=msgspec.json.encode(ORDERS).decode(), disable_any_whitespace=True),
        tokens=2 * TOKENS,
    ),
    TextTask("a summary", f"Say in a few sentences what this letter says:\n\n{LETTER}"),
    TextTask("free prose", "Write a short story about a lighthouse keeper and a lost dog."),
)


class TextRun:
    """The tasks on one model: one engine without drafts, one with, in turn."""

    def __init__(self, config: EngineConfig, tasks: Sequence[TextTask] = TASKS) -> None:
        self.tasks = tasks
        tokenizer = Tokenizer.load(resolve_model(config.model))
        if tokenizer is None:
            raise ComparisonError(f"{config.model} has no tokenizer, which real work needs")
        self._tokenizer = tokenizer
        model = prepare_model(config)
        self._engines = [
            Engine.for_model(model, msgspec.structs.replace(config, speculation=speculation))
            for speculation in ("off", "auto")
        ]

    def measure(
        self, rounds: int, results: SpeculationResults, report: Callable[[str], None], done: Callable[[], None]
    ) -> None:
        """What is missing of so many rounds."""
        kept = {(row.task, row.round) for row in results.texts}
        for task in self.tasks:
            left = [number for number in range(rounds) if (task.name, number) not in kept]
            if not left:
                continue
            report(f"{task.name}: once without and with drafts, to begin with")
            prompt, params = self._asked(task)
            answer, _ = self._answered(0, prompt, params)
            if len(answer) < LEAST_TOKENS:
                report(f"{task.name}: its answer has {len(answer)} tokens, too few to say anything")
                continue
            told = params
            if task.predicted:
                told = msgspec.structs.replace(params, prediction_token_ids=tuple(self._changed(answer)))
            self._answered(1, prompt, told)
            for number in left:
                report(f"{task.name}: round {number + 1} of {rounds}")
                results.texts.append(self._row(task, number, prompt, params, told))
                done()

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def _asked(self, task: TextTask) -> tuple[list[int], SamplingParams]:
        template = self._tokenizer.chat_template
        text = f"{task.message}\n\n"
        if template is not None:
            text = template.render([{"role": "user", "content": task.message}])
        prompt = self._tokenizer.encode(text + task.begins)
        context = self._engines[0].capacity.max_model_len
        if len(prompt) + task.tokens > context:
            what = f"{task.name} takes {len(prompt) + task.tokens} tokens"
            raise ComparisonError(f"{what}; the text model's context is {context}")
        params = SamplingParams(temperature=0.0, max_tokens=task.tokens, structured_outputs=task.shape)
        for engine in self._engines:
            engine.check(params)
        return prompt, params

    def _changed(self, answer: Sequence[int]) -> list[int]:
        """An answer with one word in CHANGED_EVERY replaced by another."""
        words = self._tokenizer.decode(list(answer)).split(" ")
        words[CHANGED_EVERY // 2 :: CHANGED_EVERY] = [CHANGED] * len(words[CHANGED_EVERY // 2 :: CHANGED_EVERY])
        return self._tokenizer.encode(" ".join(words))

    def _row(
        self, task: TextTask, number: int, prompt: list[int], params: SamplingParams, told: SamplingParams
    ) -> TextRow:
        report = self._engines[1].drafter.report
        before = dict(report.drafted), dict(report.accepted)
        order = (1, 0) if number % 2 else (0, 1)
        found = {which: self._answered(which, prompt, told if which else params) for which in order}
        (plain, without_s), (answer, with_s) = found[0], found[1]
        return TextRow(
            task=task.name,
            round=number,
            tokens=len(plain),
            ms_without=1e3 * without_s / max(len(plain) - 1, 1),
            ms_with=1e3 * with_s / max(len(answer) - 1, 1),
            drafted={name: count - before[0][name] for name, count in report.drafted.items()},
            accepted={name: count - before[1][name] for name, count in report.accepted.items()},
            same=plain == answer,
        )

    def _answered(self, which: int, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
        """An answer, and the seconds from its first token on. Raises ComparisonError."""
        engine, tokens = self._engines[which], list[int]()
        engine.add("text", list(prompt), params)
        began = ended = 0.0
        while engine.has_work:
            for delta in engine.step():
                if delta.error:
                    raise ComparisonError(f"the text model's step failed: {delta.error}")
                tokens += delta.token_ids
                ended = time.perf_counter()
                began = began or ended
        return tokens, ended - began
