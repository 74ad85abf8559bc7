// The page: its views, its forms, and what they have in common.

import { address, call, key } from "./api.js";
import { Atoms } from "./atoms.js";
import { byId, el, onceAFrame } from "./dom.js";
import { Live } from "./live.js";
import { body, FIELDS, form, FORMS, picks, sampling, tools } from "./request.js";
import { curl, python } from "./snippets.js";
import { Writer } from "./writing.js";

const VIEWS = ["chat", "completion", "live"];
const ENDPOINTS = { chat: "chat/completions", completion: "completions" };
// A field of the API, and its element where that is not called the same.
const BLAMED = { messages: "message", response_format: "form-text", structured_outputs: "form-text" };

const atoms = new Atoms();
const live = new Live();
let models = [];
let view = "chat";

const model = () => models.find(({ id }) => id === byId("model").value) ?? null;

/** The texts of the sampling fields by name. */
const values = () => Object.fromEntries(FIELDS.map(({ name }) => [name, byId(name).value]));

/** What the forms ask for. Throws FieldError. */
function asked() {
  return {
    model: byId("model").value,
    fields: sampling(values()),
    form: form(byId("form-kind").value, byId("form-text").value),
    tools: view === "chat" ? tools(byId("tools").value) : {},
    atoms: byId("ask-atoms").checked ? picks(model()) : null,
  };
}

/** Tell an error, and lead to the field that is to blame. */
function fail(error) {
  byId("notice").textContent = error.message;
  const param = error.status === 401 ? "key" : error.param?.split(".")[0];
  const field = byId(BLAMED[param] ?? param);
  if (!field) return;
  const details = field.closest("details");
  if (details) details.open = true;
  field.setAttribute("aria-invalid", "true");
  field.focus();
}

function clear() {
  byId("notice").textContent = "";
  document.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
}

const writer = new Writer({
  atoms,
  fail,
  clear,
  /** The whole body around messages or a prompt; null where a field cannot be read, which has been told. */
  body(content) {
    try {
      return body(content, asked());
    } catch (error) {
      clear();
      fail(error);
      return null;
    }
  },
  busy(on) {
    document.querySelectorAll(".send").forEach((button) => (button.disabled = on));
    document.querySelectorAll(".stop").forEach((button) => (button.disabled = !on));
  },
});

/** The request that the forms stand for, as code. */
const showCode = onceAFrame(() => {
  if (!byId("code").open || view === "live") return;
  const endpoint = ENDPOINTS[view];
  let texts = ["", ""];
  try {
    const content =
      view === "chat"
        ? { messages: writer.messages(byId("message").value || "Hello") }
        : { prompt: byId("prompt").value || "Once upon a time" };
    const whole = body(content, asked());
    const hasKey = key.get() !== "";
    texts = [curl(address(`v1/${endpoint}`), whole, hasKey), python(address("v1"), endpoint, whole, hasKey)];
  } catch (error) {
    texts = [error.message, error.message];
  }
  [byId("curl").textContent, byId("python").textContent] = texts;
});

/** A model as one may choose it; an adapter says of what, and one that cannot be used why. */
function option({ id, parent, adapter }) {
  const text = adapter ? `${id} (adapter of ${parent})` : id;
  return el("option", { value: id, disabled: adapter?.error ? "" : null, title: adapter?.error ?? null }, text);
}

async function loadModels() {
  const chosen = byId("model").value;
  try {
    models = (await (await call("v1/models")).json()).data;
    clear();
  } catch (error) {
    models = [];
    fail(error);
  }
  byId("model").replaceChildren(...models.map(option));
  if (models.some(({ id }) => id === chosen)) byId("model").value = chosen;
  atoms.use(model());
  showCode();
}

function open(name) {
  view = name;
  for (const other of VIEWS) {
    const tab = byId(`tab-${other}`);
    tab.setAttribute("aria-selected", String(other === name));
    tab.tabIndex = other === name ? 0 : -1;
    byId(`view-${other}`).hidden = other !== name;
  }
  byId("work").hidden = name === "live";
  byId("chat-only").hidden = name !== "chat";
  live.show(name === "live");
  showCode();
}

async function copy(event) {
  const source = byId(event.target.dataset.of);
  let told = "Copied.";
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    // where the page is not from a secure origin there is no clipboard to write to
    getSelection().selectAllChildren(source);
    if (!document.execCommand("copy")) told = "Selected; copy it with the keyboard.";
  }
  byId("copied").textContent = told;
}

function showForm() {
  const { text } = FORMS[byId("form-kind").value];
  byId("form-text").hidden = byId("form-label").hidden = text === null;
  byId("form-label").textContent = text ?? "";
}

function build() {
  byId("fields").append(
    ...FIELDS.map(({ name, label, step, hint, value, lines }) =>
      el("label", { class: lines ? "wide" : null }, label, " ",
        lines
          ? el("textarea", { id: name, rows: 2 })
          : el("input", { id: name, type: "number", step, value, placeholder: hint })),
    ),
  );
  byId("form-kind").append(...Object.entries(FORMS).map(([value, { label }]) => el("option", { value }, label)));
  byId("key").value = key.get();
}

function listen() {
  byId("key").addEventListener("change", () => {
    key.set(byId("key").value.trim());
    loadModels();
  });
  byId("model").addEventListener("change", () => atoms.use(model()));
  byId("form-kind").addEventListener("change", showForm);
  byId("new-chat").addEventListener("click", () => {
    writer.forget();
    clear();
    byId("message").focus();
  });
  document.querySelectorAll(".stop").forEach((button) => button.addEventListener("click", () => writer.stop()));
  document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", copy));
  const submits = (id, field, send) => {
    byId(id).addEventListener("submit", (event) => {
      event.preventDefault();
      const text = byId(field).value;
      if (writer.stopper === null && text.trim()) send(text).finally(showCode);
    });
    byId(field).addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId(id).requestSubmit();
    });
  };
  submits("chat-form", "message", (text) => writer.chat(text));
  submits("completion-form", "prompt", (text) => writer.complete(text));
  for (const kind of ["input", "change"]) document.addEventListener(kind, showCode);
  byId("code").addEventListener("toggle", showCode);
  VIEWS.forEach((name, i) => {
    byId(`tab-${name}`).addEventListener("click", () => open(name));
    byId(`tab-${name}`).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = VIEWS[(i + step + VIEWS.length) % VIEWS.length];
      open(next);
      byId(`tab-${next}`).focus();
    });
  });
}

build();
listen();
showForm();
open("chat");
loadModels();
