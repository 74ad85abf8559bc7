// The view of what tokens pick, atoms of DSC layers or experts and adapters of mixtures: tokens as cells, what each
// picked, which tokens share it, and a map of all that was used.

import { byId, el, onceAFrame } from "./dom.js";
import { TokenNames, visible } from "./names.js";
import { Picks } from "./routing.js";

const NEAREST = 5;
const HOTTEST = 8;
const MOVES = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

function tableOf(names, rows) {
  const head = el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name)));
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows));
}

const title = (words) => `${words[0].toUpperCase()}${words.slice(1)}`;

export class Atoms {
  #picks = null;
  #model = null;
  #kept = null; // the token that stays while the pointer is elsewhere
  #shown = null;
  #drawCells = onceAFrame(() => this.#shadeCells());

  constructor() {
    this.names = new TokenNames(() => this.#nameCells());
    this.cells = byId("cells");
    this.canvas = byId("map");
    byId("shade").addEventListener("change", () => this.#shadeCells());
    // What was shown last stays, so that the pointer can go to its atoms.
    this.cells.addEventListener("mouseleave", () => this.#show(this.#kept ?? this.#shown));
    this.cells.addEventListener("keydown", (event) => this.#move(event));
    this.canvas.addEventListener("mousemove", (event) => this.#pointAt(event));
    this.canvas.addEventListener("mouseleave", () => this.#leaveMap());
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", () => this.#picks && this.finish());
  }

  /** Another model from the list of models, or null. */
  use(model) {
    this.#model = model;
    this.names.use(model?.id ?? "");
    this.reset();
  }

  reset() {
    const told = this.#model?.picks;
    const picks = (this.#picks = told ? new Picks(told) : null);
    this.#kept = this.#shown = null;
    for (const place of [this.cells, byId("token"), byId("layers")]) place.replaceChildren();
    byId("map-place").textContent = "";
    this.canvas.hidden = byId("map-title").hidden = true;
    byId("ask-atoms").disabled = !told;
    const { many, signal } = picks?.words ?? { many: "atoms" };
    byId("atoms-title").textContent = title(many);
    byId("ask-what").textContent = many;
    const all = picks
      ? [[picks.shape.layers, `mean ${signal}`], ...told.layers.map((number, i) => [i, `${signal} of layer ${number}`])]
      : [];
    const before = [...byId("shade").options].map(({ label }) => label);
    if (before.join() !== all.map(([, label]) => label).join())
      byId("shade").replaceChildren(...all.map(([value, label]) => el("option", { value }, label)));
    const tenant = this.#model?.adapter ? `With the adapter ${this.#model.id}: ` : "";
    byId("atoms-note").textContent = picks
      ? `${tenant}${told.per_token} of ${told.number} ${many} in each of ${told.layers.length} layers`
      : this.#model && "This model's tokens pick nothing: it has neither DSC layers nor a mixture of experts or LoRAs.";
  }

  /** A part of the report. usage: of the same event, which says how many tokens are the prompt's. */
  add(routing, usage) {
    if (!this.#picks) return;
    if (usage) this.#picks.promptSize = usage.prompt_tokens;
    for (const token of this.#picks.add(routing)) this.cells.append(this.#cell(token));
    this.#drawCells();
    this.names.fetch();
  }

  /** The report is whole. */
  finish() {
    if (!this.#picks?.tokens.length) return;
    this.#shadeCells();
    const usage = this.#picks.usage(HOTTEST);
    this.#drawMap(usage);
    this.#listLayers(usage);
  }

  #rowOf(layer) {
    return el("th", { scope: "row" }, String(this.#picks.numbers[layer]));
  }

  #cell(token) {
    const cell = el("button", {
      type: "button", class: "cell", "aria-pressed": "false", tabindex: this.cells.childElementCount ? -1 : 0,
      onmouseenter: () => this.#show(token), onfocus: () => this.#show(token), onclick: () => this.#keep(token),
    });
    token.cell = cell;
    this.#name(token);
    return cell;
  }

  #name(token) {
    const text = visible(this.names.of(token.id));
    const part = this.#part(token);
    token.cell.textContent = text;
    token.cell.classList.toggle("answer", part === "answer");
    const signal = this.#picks.signal(token, this.#picks.shape.layers).toFixed(2);
    token.cell.setAttribute("aria-label", `${text}, token ${token.position} of the ${part}, ${this.#picks.words.signal} ${signal}`);
  }

  #part(token) {
    return token.position < this.#picks.promptSize ? "prompt" : "answer";
  }

  #nameCells() {
    for (const token of this.#picks?.tokens ?? []) if (token) this.#name(token);
    if (this.#shown) this.#show(this.#shown);
    if (byId("layers").childElementCount) this.#listLayers(this.#picks.usage(HOTTEST));
  }

  #shadeCells() {
    const layer = Number(byId("shade").value);
    for (const token of this.#picks?.tokens ?? [])
      token?.cell.style.setProperty("--shade", `${Math.round(this.#picks.shade(token, layer) * 100)}%`);
  }

  #keep(token) {
    this.#press(this.#kept === token ? null : token);
    this.#show(token);
  }

  #press(token) {
    this.#kept = token;
    for (const cell of this.cells.children) cell.setAttribute("aria-pressed", String(cell === token?.cell));
  }

  #move(event) {
    const cells = [...this.cells.children];
    const at = cells.indexOf(document.activeElement);
    const ends = { Home: 0, End: cells.length - 1 };
    const to = event.key in MOVES ? at + MOVES[event.key] : ends[event.key];
    if (event.key === "Escape") {
      this.#press(null);
      this.#show(null);
    }
    if (at < 0 || to === undefined || !cells[to]) return;
    event.preventDefault();
    cells[at].tabIndex = -1;
    cells[to].tabIndex = 0;
    cells[to].focus();
  }

  /** Light up each cell by a share from 0 to 1; null: none. */
  #light(share) {
    for (const token of this.#picks?.tokens ?? []) {
      const value = share && token ? share(token) : 0;
      token?.cell.classList.toggle("lit", value > 0);
      token?.cell.style.setProperty("--share", value.toFixed(2));
    }
  }

  #show(token) {
    this.#shown = token;
    const place = byId("token");
    if (!token) {
      place.replaceChildren();
      this.#light(null);
      return;
    }
    this.#lightAround(token);
    const text = el("strong", {}, visible(this.names.of(token.id)));
    const heading = el("p", {}, text, ` · token ${token.position} of the ${this.#part(token)}`);
    const rows = token.layers.map((picked, layer) =>
      el("tr", {}, this.#rowOf(layer), el("td", {}, token.signal[layer].toFixed(3)),
        el("td", {}, ...picked.map(({ atom, coefficient: c }) => this.#chip(layer, atom, c.toFixed(3), c)))),
    );
    const { many, weights, signal } = this.#picks.words;
    const table = tableOf(["Layer", title(signal), `${title(many)}, with their ${weights}`], rows);
    place.replaceChildren(heading, table, this.#neighbours(token));
  }

  #lightAround(token) {
    this.#light((other) => this.#picks.shared(token, other) / token.keys.size);
  }

  #neighbours(token) {
    const near = this.#picks.nearest(token, NEAREST);
    if (!near.length) return el("p", {}, `It shares no ${this.#picks.words.one} with another token.`);
    const named = near.map(
      ({ token: other, count }) => `${visible(this.names.of(other.id)).trim()} (token ${other.position}): ${count}`,
    );
    return el("p", {}, `Shares most, of its ${token.keys.size} picks, with ${named.join("; ")}`);
  }

  /** An atom as a button that lights up the tokens that picked it. */
  #chip(layer, atom, value, weight = 0) {
    const key = this.#picks.key(layer, atom);
    const light = () => this.#light((token) => (token.keys.has(key) ? 1 : 0));
    const back = () => (this.#shown ? this.#lightAround(this.#shown) : this.#light(null));
    const chip = el("button", {
      type: "button", class: "chip", "aria-label": `${title(this.#picks.words.one)} ${atom} of layer ${this.#picks.numbers[layer]}, ${value}`,
      onmouseenter: light, onfocus: light, onmouseleave: back, onblur: back,
    }, el("b", {}, String(atom)), ` ${value}`);
    chip.style.setProperty("--weight", `${Math.round(Math.min(Math.abs(weight), 1) * 100)}%`);
    return chip;
  }

  /** One pixel for each atom of each layer: none where it is dead, the stronger the oftener it was picked. */
  #drawMap({ counts, rows }) {
    const { layers, atoms } = this.#picks.shape;
    Object.assign(this.canvas, { width: atoms, height: layers });
    this.canvas.style.setProperty("--layers", layers);
    this.canvas.hidden = byId("map-title").hidden = false;
    const context = this.canvas.getContext("2d");
    const style = getComputedStyle(this.canvas);
    const most = Math.max(...counts, 1);
    context.clearRect(0, 0, atoms, layers);
    context.fillStyle = style.getPropertyValue("--hot");
    for (const [key, count] of counts.entries()) {
      if (!count) continue;
      context.globalAlpha = 0.2 + 0.8 * (Math.log(1 + count) / Math.log(1 + most));
      context.fillRect(key % atoms, Math.floor(key / atoms), 1, 1);
    }
    const [all, used] = [layers * atoms, rows.reduce((total, row) => total + row.used, 0)];
    const named = `Layers by ${this.#picks.words.many}`;
    this.canvas.setAttribute("aria-label", `${named}: ${used} of ${all} were picked, ${all - used} were not`);
    this.counts = counts;
  }

  #pointAt(event) {
    const { layers, atoms } = this.#picks.shape;
    const box = this.canvas.getBoundingClientRect();
    const at = (offset, size, cells) => Math.min(Math.max(Math.floor((offset / size) * cells), 0), cells - 1);
    const atom = at(event.clientX - box.left, box.width, atoms);
    const layer = at(event.clientY - box.top, box.height, layers);
    const key = this.#picks.key(layer, atom);
    const where = `Layer ${this.#picks.numbers[layer]}, ${this.#picks.words.one} ${atom}`;
    byId("map-place").textContent = `${where}: picked by ${this.counts[key]} tokens`;
    this.#light((token) => (token.keys.has(key) ? 1 : 0));
  }

  #leaveMap() {
    byId("map-place").textContent = "";
    this.#show(this.#shown);
  }

  #listLayers({ rows }) {
    const { atoms } = this.#picks.shape;
    const body = rows.map(({ used, hottest }, layer) =>
      el("tr", {}, this.#rowOf(layer),
        el("td", {}, String(used)), el("td", {}, String(atoms - used)),
        el("td", {}, ...hottest.map(({ atom, count }) => this.#chip(layer, atom, `×${count}`)))),
    );
    const names = ["Layer", "Picked", "Dead", `Hottest ${this.#picks.words.many}, and how many tokens picked them`];
    byId("layers").replaceChildren(tableOf(names, body));
  }
}
