// The chat and the completion: what the person wrote, what the model answers, and how it ended.

import { byId, el } from "./dom.js";
import { generate, summary } from "./generate.js";

const ROLES = { user: "You", assistant: "Model", tool: "Result of a tool", system: "System" };

/** One message on the page; its text grows by text nodes. */
class Message {
  constructor(role, text = "") {
    this.text = el("div", { class: "text" }, text);
    this.tools = el("div", { class: "tools" });
    this.facts = el("p", { class: "facts" });
    const name = el("strong", {}, ROLES[role] ?? role);
    this.item = el("li", { class: `message ${role}` }, name, this.text, this.tools, this.facts);
  }

  add(text) {
    this.text.append(text);
  }

  /** The calls as far as they have come. */
  show(calls) {
    calls.calls.forEach((call, i) => {
      if (!this.tools.children[i]) this.tools.append(el("pre", { class: "call", "aria-label": "Tool call" }));
      this.tools.children[i].textContent = `${call.function.name}(${call.function.arguments})`;
    });
  }

  fail(message) {
    this.item.classList.add("failed");
    this.facts.textContent = message;
  }
}

/** Runs one generation at a time. page: {body(content, endpoint), atoms, fail(error), clear(), busy(on)}. */
export class Writer {
  constructor(page) {
    this.page = page;
    this.history = [];
    this.stopper = null;
    this.log = byId("conversation");
  }

  stop() {
    this.stopper?.abort();
  }

  forget() {
    this.stop();
    this.history = [];
    this.log.replaceChildren();
    this.page.atoms.reset();
  }

  /** The messages of the next request: a system message, what has been said, and `draft` where there is one. */
  messages(draft = "") {
    const system = byId("system").value.trim();
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...this.history,
      ...(draft ? [{ role: "user", content: draft }] : []),
    ];
  }

  async chat(draft) {
    const content = this.page.body({ messages: this.messages(draft) });
    if (content === null) return;
    const { history } = this;
    const sent = new Message("user", draft);
    this.log.append(sent.item);
    history.push({ role: "user", content: draft });
    byId("message").value = "";
    if (!(await this.answer(content))) {
      history.pop(); // nothing came of it: it can be sent again
      sent.item.remove();
      byId("message").value = draft;
    }
  }

  /** An answer to the conversation as it stands; false where there was none at all. */
  async answer(body) {
    const { history } = this;
    const message = new Message("assistant");
    this.log.append(message.item);
    const outcome = await this.run("v1/chat/completions", body, message, this.log);
    if (outcome === null) {
      message.item.remove();
      return false;
    }
    const calls = outcome.calls.calls.filter(Boolean);
    history.push({ role: "assistant", content: outcome.text, ...(calls.length ? { tool_calls: calls } : {}) });
    if (calls.length && outcome.reason !== "stopped") this.askForResults(message, calls);
    return true;
  }

  /** A field for the result of each call, and a button that sends them and lets the model go on. */
  askForResults(message, calls) {
    const fields = calls.map((call) => el("textarea", { rows: 2, "aria-label": `Result of ${call.function.name}` }));
    const send = async (event) => {
      event.preventDefault();
      const results = calls.map((call, i) => ({ role: "tool", tool_call_id: call.id, content: fields[i].value }));
      const body = this.stopper ? null : this.page.body({ messages: [...this.messages(), ...results] });
      if (body === null) return;
      this.history.push(...results);
      form.remove();
      results.forEach((result) => this.log.append(new Message("tool", result.content).item));
      await this.answer(body);
    };
    const form = el("form", { onsubmit: send }, ...fields, el("button", {}, "Send results"));
    message.tools.append(form);
  }

  async complete(prompt) {
    const body = this.page.body({ prompt });
    if (body === null) return;
    const message = new Message("completion");
    const place = byId("completion");
    message.text.append(el("span", { class: "given" }, prompt));
    place.replaceChildren(el("ul", {}, message.item));
    if ((await this.run("v1/completions", body, message, place)) === null) place.replaceChildren();
  }

  /** The outcome; null where nothing came: it was stopped, or failed with an error that has been told. */
  async run(path, body, message, log) {
    const { page } = this;
    const stopper = (this.stopper = new AbortController());
    const started = performance.now();
    let first = null;
    const news = (show) => (...told) => {
      first ??= performance.now();
      show(...told);
      log.scrollTop = log.scrollHeight;
    };
    page.clear();
    page.busy(true);
    page.atoms.reset();
    log.setAttribute("aria-busy", "true"); // read out when it is whole
    try {
      const outcome = await generate(path, body, stopper.signal, {
        text: news((text) => message.add(text)),
        tools: news((calls) => message.show(calls)),
        routing: (routing, usage) => page.atoms.add(routing, usage),
      });
      if (first === null && outcome.reason === "stopped") return null;
      message.facts.textContent = summary(outcome, started, first);
      return outcome;
    } catch (error) {
      page.fail(error);
      const { outcome } = error;
      if (first === null || !outcome) return null;
      message.fail(error.message);
      return outcome;
    } finally {
      page.busy(false);
      log.removeAttribute("aria-busy");
      page.atoms.finish();
      this.stopper = null;
    }
  }
}
