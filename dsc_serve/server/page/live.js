// The live view: scrapes of /metrics as charts, and none of them while nobody looks.

import { call } from "./api.js";
import { Chart } from "./chart.js";
import { byId } from "./dom.js";
import { increase, parse, quantiles, sum } from "./metrics.js";

const PERIOD_MS = 2000;
const SHOWN_MS = 5 * 60 * 1000;
const WINDOW = 5; // scrapes that quantiles and shares are of
const GAP_MS = 3 * PERIOD_MS;

const count = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
const seconds = (value) => (value < 1 ? `${count(value * 1000)} ms` : `${count(value)} s`);
const percent = (value) => `${count(value * 100)} %`;

const rate = (name) => ({ last, now, seconds }) => divided(increase(last.families, now.families, name), seconds);
const gauge = (name, fits) => ({ now }) => sum(now.families, name, fits);
const quantile = (name, share) => ({ start, now }) => quantiles(start.families, now.families, name, [share])[0];
const share = (part, whole) => ({ start, now }) =>
  divided(increase(start.families, now.families, part), increase(start.families, now.families, whole));
const mean = (name) => ({ now }) => divided(sum(now.families, name), now.families.get(name)?.size);
const filled = (state) => ({ now }) =>
  divided(sum(now.families, "kv_blocks", (labels) => labels.state === state), sum(now.families, "kv_blocks"));

const divided = (a, b) => (a === null || a === undefined || !b ? null : a / b);

// title, unit, the family without which there is no such chart, and by its name what each line shows
const CHARTS = [
  ["Tokens a second", count, "generated_tokens_total", {
    generated: rate("generated_tokens_total"), "of prompts": rate("prompt_tokens_total"),
  }],
  ["Time to first token", seconds, "time_to_first_token_seconds_bucket", {
    median: quantile("time_to_first_token_seconds", 0.5), "95 %": quantile("time_to_first_token_seconds", 0.95),
  }],
  ["Time between tokens", seconds, "inter_token_latency_seconds_bucket", {
    median: quantile("inter_token_latency_seconds", 0.5), "95 %": quantile("inter_token_latency_seconds", 0.95),
  }],
  ["Generations", count, "requests_running", {
    running: gauge("requests_running"), waiting: gauge("requests_waiting"),
  }],
  ["Prompt tokens found in the cache", percent, "prefix_asked_tokens_total", {
    share: share("prefix_cached_tokens_total", "prefix_asked_tokens_total"),
  }],
  ["Drafts accepted", percent, "draft_tokens_total", {
    share: share("draft_accepted_tokens_total", "draft_tokens_total"),
  }],
  ["KV pool", percent, "kv_blocks", { used: filled("used"), cached: filled("cached") }],
  ["Atoms nobody picked of late", percent, "routing_dead_share", { "mean of layers": mean("routing_dead_share") }],
];

export class Live {
  #timer = null;
  #open = false;
  #scrapes = [];
  #stopper = null;

  constructor() {
    this.charts = CHARTS.map(([title, unit, family, lines]) => ({
      chart: new Chart(title, Object.keys(lines), unit),
      family,
      lines: Object.values(lines).map((value) => ({ value, points: [] })),
    }));
    byId("charts").append(...this.charts.map(({ chart }) => chart.figure));
    document.addEventListener("visibilitychange", () => this.#follow());
  }

  /** Whether the view is the one that is shown. */
  show(open) {
    this.#open = open;
    this.#follow();
  }

  /** Scrape while somebody looks, and only then. */
  #follow() {
    const looking = this.#open && document.visibilityState === "visible";
    if (looking && this.#timer === null) this.#turn();
    if (!looking) {
      clearTimeout(this.#timer);
      this.#timer = null;
      this.#stopper?.abort();
    }
  }

  async #turn() {
    const stopper = (this.#stopper = new AbortController());
    this.#timer = 0; // one is under way
    let note = "";
    try {
      const text = await (await call("metrics", { signal: stopper.signal })).text();
      this.take(performance.now(), parse(text));
      note = this.about();
    } catch (error) {
      note = `No metrics: ${error.message}`;
    }
    if (stopper.signal.aborted) return;
    if (byId("live-note").textContent !== note) byId("live-note").textContent = note;
    this.#timer = setTimeout(() => this.#turn(), PERIOD_MS);
  }

  /** What runs, in one line. */
  about() {
    const info = [...(this.#scrapes.at(-1).families.get("engine_info")?.values() ?? [])][0]?.labels;
    const facts = info ? [`dsc-serve ${info.version}`, info.kernels, info.dtype, info.device] : [];
    return [...facts, `looked at every ${PERIOD_MS / 1000} s, the last ${SHOWN_MS / 60000} minutes`].join(" · ");
  }

  /** A scrape at a time in ms. */
  take(at, families) {
    const now = { at, families };
    const scrapes = this.#scrapes;
    const last = scrapes.at(-1);
    if (last) {
      const seen = { start: scrapes.at(-WINDOW) ?? scrapes[0], last, now, seconds: (at - last.at) / 1000 };
      for (const { lines } of this.charts)
        for (const line of lines) {
          line.points = [...line.points.filter((point) => at - point.at <= SHOWN_MS), { at, value: line.value(seen) }];
        }
    }
    this.#scrapes = [...scrapes.slice(1 - WINDOW), now];
    for (const { chart, family, lines } of this.charts) {
      chart.figure.hidden = !families.has(family);
      chart.draw(lines.map(({ points }) => points), at - SHOWN_MS, at, GAP_MS);
    }
  }
}
