// The texts of token ids, asked for in lots and remembered while the model stays the same.

import { call } from "./api.js";

const LOT = 256;

export class TokenNames {
  #texts = new Map();
  #wanted = new Set();
  #asking = false;
  #model = "";

  /** onNews: called when texts have come. */
  constructor(onNews) {
    this.onNews = onNews;
  }

  use(model) {
    if (model !== this.#model) this.#texts.clear();
    this.#model = model;
  }

  /** A token's text, or its number until the text is known. */
  of(id) {
    if (this.#texts.has(id)) return this.#texts.get(id);
    this.#wanted.add(id);
    return `#${id}`;
  }

  /** Ask for the texts that were wanted. */
  async fetch() {
    if (this.#asking || this.#wanted.size === 0) return;
    this.#asking = true;
    const model = this.#model;
    const ids = [...this.#wanted].slice(0, LOT);
    let texts = null;
    try {
      const body = { tokens: ids, return_token_strs: true, ...(model ? { model } : {}) };
      texts = (await (await call("detokenize", { body })).json()).token_strs;
    } catch (error) {
      if (error.status === 400) texts = ids.map((id) => `#${id}`); // no tokenizer: numbers do
    }
    this.#asking = false;
    if (model !== this.#model || texts === null) return; // what failed is asked for again with the next tokens
    ids.forEach((id, i) => {
      this.#texts.set(id, texts[i]);
      this.#wanted.delete(id);
    });
    this.onNews();
    this.fetch();
  }
}

const MARKS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };

/** A token's text with what cannot be seen made visible. */
export function visible(text) {
  if (text === "") return "∅";
  const shown = text.startsWith("bytes:") ? text.slice(6) : text;
  if (/^\s+$/.test(shown)) return [...shown].map((letter) => MARKS[letter] ?? letter).join("");
  return shown.replaceAll("\n", "⏎");
}
