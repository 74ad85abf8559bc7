// A request as code that people paste elsewhere. Keys are never in it: it reads them from the environment.

const VARIABLE = "DSC_SERVE_KEY";

const COMMON = [
  "model", "temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty", "frequency_penalty", "stream",
  "stream_options",
];
const KNOWN = {
  "chat/completions": new Set([...COMMON, "messages", "response_format", "tools"]),
  completions: new Set([...COMMON, "prompt"]),
};

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** For a shell. */
export function curl(url, body, hasKey) {
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $${VARIABLE}"` : "";
  const data = quoted(JSON.stringify(body, null, 2));
  return `curl -N ${quoted(url)}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${data}`;
}

/** A value as Python writes it. */
export function literal(value, indent = 0) {
  const inner = " ".repeat(indent + 4);
  const outer = " ".repeat(indent);
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "string") return JSON.stringify(value).replaceAll("\u007f", "\\u007f");
  if (typeof value !== "object") return String(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const items = Array.isArray(value)
    ? value.map((item) => literal(item, indent + 4))
    : Object.entries(value).map(([name, item]) => `${literal(name)}: ${literal(item, indent + 4)}`);
  const flat = `${open}${items.join(", ")}${close}`;
  if (flat.length + indent < 80 && !flat.includes("\n")) return flat;
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${outer}${close}`;
}

/** For the openai package; endpoint: "chat/completions" or "completions", base: the address of /v1. */
export function python(base, endpoint, body, hasKey) {
  const known = KNOWN[endpoint];
  const own = Object.entries(body).filter(([name]) => known.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !known.has(name)));
  const named = own.map(([name, value]) => `    ${name}=${literal(value, 4)},\n`);
  if (Object.keys(extra).length) named.push(`    extra_body=${literal(extra, 4)},\n`);
  const key = hasKey ? `os.environ["${VARIABLE}"]` : '"none"';
  const text = endpoint === "completions" ? "chunk.choices[0].text" : 'chunk.choices[0].delta.content or ""';
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${literal(base)}, api_key=${key})
stream = client.${endpoint.replaceAll("/", ".")}.create(
${named.join("")})
for chunk in stream:
    if chunk.choices:
        print(${text}, end="", flush=True)
print()`;
}
