// The time between two tokens of each stream: kept, summed up, and drawn on the lanes' axis of time.

import { streamColour } from "./colours.js";
import { AXIS_HEIGHT, drawTimes, fitted } from "./lane_chart.js";
import { WINDOW_MS } from "./model.js";

/** @typedef {import("./colours.js").Inks} Inks */
/** @typedef {"alone"|"pictures"} Phase */

const HEIGHT = 150;
const TOP = 12; // pixels above the longest time
const LEAST_TOP_MS = 20; // the axis shows at least so much
const MAX_KEPT = 20_000; // of a phase

/**
 * @param {number[]} sorted
 * @param {number} share from 0 to 1
 */
export function quantile(sorted, share) {
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}

export class Latencies {
  constructor() {
    /** @type {Map<Phase, number[]>} */
    this.byPhase = new Map();
    /** @type {{at: number, ms: number}[][]} of each stream, within the window */
    this.points = [];
    /** @type {Map<number, number>} when the last token of each stream came */
    this.last = new Map();
    /** @type {{from: number, until: number}|null} when pictures ran */
    this.pictures = null;
  }

  /** @param {Phase} phase that it is now @param {number} now */
  during(phase, now) {
    if (phase === "pictures") this.pictures ??= { from: now, until: Infinity };
    else if (this.pictures) this.pictures.until = Math.min(this.pictures.until, now);
  }

  /** @param {number} stream @param {number} now @param {Phase} phase */
  add(stream, now, phase) {
    const before = this.last.get(stream);
    this.last.set(stream, now);
    if (before === undefined) return;
    const points = (this.points[stream] ??= []);
    points.push({ at: now, ms: now - before });
    while (points.length && points[0].at < now - WINDOW_MS - 1000) points.shift();
    const all = this.byPhase.get(phase) ?? [];
    this.byPhase.set(phase, all);
    if (all.length < MAX_KEPT) all.push(now - before);
  }

  /** @returns {{phase: Phase, count: number, p50: number, p99: number, longest: number}[]} */
  rows() {
    return [...this.byPhase].map(([phase, all]) => {
      const sorted = all.toSorted((one, other) => one - other);
      return {
        phase, count: all.length, p50: quantile(sorted, 0.5), p99: quantile(sorted, 0.99), longest: sorted.at(-1) ?? 0,
      };
    });
  }

  /** @param {number} now @returns {number|null} ms, of all streams within the window */
  median(now) {
    const seen = this.points.flat().filter((point) => point.at > now - WINDOW_MS);
    if (!seen.length) return null;
    return quantile(seen.map((point) => point.ms).toSorted((one, other) => one - other), 0.5);
  }

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {number} right the page's time at the right edge
   * @param {Inks} inks
   * @param {any} t
   */
  draw(canvas, right, inks, t) {
    const { context, width } = fitted(canvas, HEIGHT + AXIS_HEIGHT);
    this.#shadePictures(context, width, right, inks, t);
    drawTimes(context, width, HEIGHT, inks, t);
    const seen = this.points.map((points) => points.filter((point) => point.at > right - WINDOW_MS - 500));
    const longest = Math.max(LEAST_TOP_MS, ...seen.flat().map((point) => point.ms));
    const top = roundedUp(longest);
    const y = (/** @type {number} */ ms) => HEIGHT - ((HEIGHT - TOP) * ms) / top;
    drawTicks(context, width, top, y, inks, t);
    seen.forEach((points, stream) => {
      context.strokeStyle = context.fillStyle = streamColour(stream, inks.theme);
      context.lineWidth = 1.25;
      context.beginPath();
      for (const point of points) {
        const x = width * (1 - (right - point.at) / WINDOW_MS);
        context.lineTo(x, y(point.ms));
      }
      context.stroke();
    });
  }

  /** @param {CanvasRenderingContext2D} context @param {number} width @param {number} right @param {Inks} inks
   * @param {any} t */
  #shadePictures(context, width, right, inks, t) {
    if (!this.pictures) return;
    const x = (/** @type {number} */ at) => Math.max(0, Math.min(width, width * (1 - (right - at) / WINDOW_MS)));
    const [left, end] = [x(this.pictures.from), x(this.pictures.until)];
    if (end <= left) return;
    context.fillStyle = inks.line;
    context.globalAlpha = 0.35;
    context.fillRect(left, 0, end - left, HEIGHT);
    context.globalAlpha = 1;
    context.font = inks.font;
    context.textAlign = "right";
    context.textBaseline = "top";
    context.fillStyle = inks.soft;
    const words = t("lanes.phase.pictures");
    if (end - left > context.measureText(words).width + 8) context.fillText(words, end - 5, 2);
  }
}

/** @param {CanvasRenderingContext2D} context @param {number} width @param {number} top
 * @param {(ms: number) => number} y @param {Inks} inks @param {any} t */
function drawTicks(context, width, top, y, inks, t) {
  context.font = inks.font;
  context.textAlign = "left";
  context.textBaseline = "bottom";
  for (const ms of [top / 2, top]) {
    context.fillStyle = inks.line;
    context.fillRect(0, Math.round(y(ms)), width, 1);
    context.fillStyle = inks.soft;
    context.fillText(t("lanes.ms", { ms }), 3, y(ms) + (ms === top ? 14 : -1));
  }
}

/** @param {number} value @returns {number} the next of 1, 2, 5, 10, 20, … */
function roundedUp(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * ([1, 2, 5, 10].find((factor) => factor * unit >= value) ?? 10);
}
