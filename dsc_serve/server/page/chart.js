// A small line chart of the last minutes.

import { el, svg } from "./dom.js";

const [WIDTH, HEIGHT, EDGE] = [300, 80, 3];

/** The end of an axis: 1, 2 or 5 times a power of ten, not below the value. */
export function axisEnd(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((times) => times * power >= value * (1 - 1e-9));
}

/** The path of the points [{at, value}]; where a value is null, or the next one too late, it is interrupted. */
export function path(points, from, to, top, gap) {
  let d = "";
  let last = null;
  for (const { at, value } of points) {
    if (value === null) last = null;
    else {
      const x = (((at - from) / (to - from)) * WIDTH).toFixed(1);
      const y = (HEIGHT - EDGE - (value / top) * (HEIGHT - 2 * EDGE)).toFixed(1);
      d += `${last !== null && at - last <= gap ? "L" : "M"}${x} ${y}`;
      if (last === null || at - last > gap) d += "h0.01"; // a point by itself is seen too
      last = at;
    }
  }
  return d;
}

/** title; lines: their names; unit: a function from a value to text. */
export class Chart {
  constructor(title, lines, unit) {
    this.title = title;
    this.unit = unit;
    const stroke = (i) => svg("path", { class: `line line-${i}` });
    this.lines = lines.map((name, i) => ({ name, stroke: stroke(i), now: el("output") }));
    this.top = el("span", { class: "axis" });
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.svg.append(...this.lines.map(({ stroke }) => stroke));
    const names = this.lines.map(({ name, now }, i) => el("span", { class: `key key-${i}` }, name, " ", now));
    const caption = el("figcaption", {}, el("h2", {}, title), el("p", {}, ...names));
    this.figure = el("figure", {}, caption, this.top, this.svg);
  }

  /** rows: for each line its points over time; from and to: the ends of the axis, gap: see `path`; in ms. */
  draw(rows, from, to, gap) {
    const values = rows.flat().map(({ value }) => value).filter((value) => value !== null);
    const top = axisEnd(Math.max(0, ...values));
    this.top.textContent = this.unit(top);
    const told = this.lines.map(({ name, stroke, now }, i) => {
      stroke.setAttribute("d", path(rows[i], from, to, top, gap));
      const last = rows[i].at(-1)?.value ?? null;
      now.textContent = last === null ? "–" : this.unit(last);
      return `${name} ${last === null ? "none" : this.unit(last)}`;
    });
    const most = values.length ? `; highest of the last minutes ${this.unit(Math.max(...values))}` : "";
    this.svg.setAttribute("aria-label", `${this.title}: ${told.join(", ")}${most}`);
  }
}
