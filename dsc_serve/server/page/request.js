// What a request's body is made of: the fields of the form, and the values in them.

const number = (name, label, step, hint, integer = false, value = "") => ({ name, label, step, hint, integer, value });

export const FIELDS = [
  number("temperature", "Temperature", 0.1, "1"),
  number("top_p", "Top p", 0.05, "1"),
  number("top_k", "Top k", 1, "off", true),
  number("min_p", "Min p", 0.05, "0"),
  number("max_tokens", "Most tokens", 1, "as the server says", true, "256"),
  number("seed", "Seed", 1, "random", true),
  number("repetition_penalty", "Repetition penalty", 0.05, "1"),
  number("presence_penalty", "Presence penalty", 0.1, "0"),
  number("frequency_penalty", "Frequency penalty", 0.1, "0"),
  { name: "stop", label: "Stop texts, one a line; \\n is a line's end", lines: true },
];

export const FORMS = {
  none: { label: "any text", text: null },
  json_object: { label: "JSON", text: null },
  json_schema: { label: "JSON of a schema", text: "Schema" },
  regex: { label: "regular expression", text: "Expression" },
  choice: { label: "one of some texts", text: "Texts, one a line" },
  grammar: { label: "grammar (Lark or GBNF)", text: "Grammar" },
};

/** A field that cannot be read; `param` as the API would name it. */
export class FieldError extends Error {
  constructor(param, message) {
    super(message);
    this.param = param;
  }
}

function json(param, text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new FieldError(param, `${what} is not JSON: ${error.message}`);
  }
}

const lines = (text) => text.split("\n").filter((line) => line !== "");

/** The sampling fields of a body, from texts by name; empty ones are left out. Throws FieldError. */
export function sampling(values) {
  const body = {};
  for (const field of FIELDS) {
    const text = values[field.name] ?? "";
    if (text.trim() === "" && !field.lines) continue;
    if (field.lines) {
      const stops = lines(text).map((line) => line.replaceAll("\\n", "\n"));
      if (stops.length) body[field.name] = stops;
      continue;
    }
    const value = Number(text);
    if (!Number.isFinite(value) || (field.integer && !Number.isInteger(value))) {
      const allowed = field.integer ? "a whole number" : "a number";
      throw new FieldError(field.name, `${field.label} is ${text}; it must be ${allowed}`);
    }
    body[field.name] = value;
  }
  return body;
}

/** The part of a body that says what form the answer has. Throws FieldError. */
export function form(kind, text) {
  if (kind === "none") return {};
  if (kind === "json_object") return { response_format: { type: "json_object" } };
  if (kind === "json_schema") {
    const schema = json("response_format", text, "the schema");
    return { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } };
  }
  return { structured_outputs: { [kind]: kind === "choice" ? lines(text) : text } };
}

/** The tools of a body: a list in JSON, or nothing. Throws FieldError. */
export function tools(text) {
  return text.trim() === "" ? {} : { tools: json("tools", text, "the list of tools") };
}

const MOST_PICKS = 2 ** 20; // that are told of one answer
const SHOWN = 16; // atoms of one token and layer that a person looks at

/** What asks for the picks of a model, given its entry in the list of models; null where there are none. */
export function picks(model) {
  const told = model?.picks;
  if (!told) return null;
  const room = Math.floor(MOST_PICKS / (model.max_model_len * told.layers.length));
  return Math.min(told.per_token, SHOWN, Math.max(room, 1));
}

/** The whole body. asked: {model, fields, form, tools, atoms}, of which atoms is what `picks` gave, or null. */
export function body(content, asked) {
  return {
    ...(asked.model ? { model: asked.model } : {}),
    ...content,
    ...asked.fields,
    ...asked.form,
    ...asked.tools,
    stream: true,
    stream_options: { include_usage: true, ...(asked.atoms ? { continuous_usage_stats: true } : {}) },
    ...(asked.atoms ? { dsc: { return_routing: true, top_k_atoms: asked.atoms } } : {}),
  };
}
