// One generation: a request, its stream, and the button that stops it.

import { call, events, texts } from "./api.js";

/** Tool calls put together from the pieces of a stream. */
export class ToolCalls {
  calls = [];

  /** Takes in `delta.tool_calls` of one event; returns the calls that it changed. */
  add(pieces) {
    const changed = [];
    for (const piece of pieces) {
      const index = piece.index ?? this.calls.length;
      const known = (this.calls[index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
      if (piece.id) known.id = piece.id;
      if (piece.function?.name) known.function.name += piece.function.name;
      if (piece.function?.arguments) known.function.arguments += piece.function.arguments;
      changed.push(known);
    }
    return changed;
  }
}

/**
 * Asks, and tells what comes: `see.text(string)`, `see.tools(ToolCalls)`, `see.routing(object, usage)`. Resolves with
 * {text, calls, reason, usage, timings}; what `signal` aborts has the reason "stopped". Throws what `call` throws.
 */
export async function generate(path, body, signal, see) {
  const outcome = { text: "", calls: new ToolCalls(), reason: null, usage: null, timings: null };
  try {
    const response = await call(path, { body, signal });
    for await (const event of events(texts(response))) {
      outcome.usage = event.usage ?? outcome.usage;
      for (const choice of event.choices ?? []) take(choice, outcome, see);
    }
  } catch (error) {
    if (!signal.aborted) throw Object.assign(error, { outcome });
    outcome.reason = "stopped";
  }
  return outcome;
}

function take(choice, outcome, see) {
  const text = choice.delta ? choice.delta.content : choice.text;
  if (text) {
    outcome.text += text;
    see.text(text);
  }
  if (choice.delta?.tool_calls?.length) {
    outcome.calls.add(choice.delta.tool_calls);
    see.tools(outcome.calls);
  }
  if (choice.dsc?.routing) see.routing(choice.dsc.routing, outcome.usage);
  outcome.timings = choice.dsc?.timings ?? outcome.timings;
  outcome.reason = choice.finish_reason ?? outcome.reason;
}

const milliseconds = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0));

/** What came of a generation, in one line. started, first: performance.now() of the request and of its first news. */
export function summary(outcome, started, first) {
  const parts = [];
  const made = outcome.usage?.completion_tokens;
  if (made !== undefined) {
    const cached = outcome.usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${outcome.usage.prompt_tokens} + ${made} tokens${cached ? `, ${cached} of them cached` : ""}`);
  }
  const ttft = outcome.timings?.ttft_ms ?? (first === null ? null : first - started);
  if (ttft !== null) parts.push(`first after ${milliseconds(ttft)} ms`);
  const measured = made > 1 && first !== null ? (performance.now() - first) / (made - 1) : null;
  const between = outcome.timings?.mean_itl_ms ?? measured;
  if (between) parts.push(`then ${milliseconds(between)} ms each`);
  if (outcome.reason) parts.push(outcome.reason);
  return parts.join(" · ");
}
