// Draws the lanes on a canvas, and finds what lies below a point.

import { requestColour, streamColour } from "./colours.js";
import { WINDOW_MS } from "./model.js";

/** @typedef {import("./model.js").Lane} Lane */
/** @typedef {import("./model.js").Work} Work */
/** @typedef {import("./model.js").LanesModel} LanesModel */
/** @typedef {import("./colours.js").Inks} Inks */

export const LANE_HEIGHT = 46; // pixels, as the style has it for the names
export const AXIS_HEIGHT = 22;
const PAD = 5;
const MIN_WIDTH = 1.2; // pixels: shorter work would not be seen
const POINTED = 3; // pixels around a point
const HATCH = 7; // pixels between two lines of a field
const WITH_PREFILL = new Set(["prefill", "decode and prefill"]);

/**
 * The canvas in the size that it is shown in, with a context whose unit is a CSS pixel.
 * @param {HTMLCanvasElement} canvas
 * @param {number} height
 */
export function fitted(canvas, height) {
  const scale = devicePixelRatio || 1;
  const width = Math.max(1, canvas.clientWidth);
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width };
}

/**
 * Lines at every five seconds, with their names below.
 * @param {CanvasRenderingContext2D} context
 * @param {number} width
 * @param {number} height above the names
 * @param {Inks} inks
 * @param {(key: string, values?: Object<string, string|number>) => string} t
 */
export function drawTimes(context, width, height, inks, t) {
  context.font = inks.font;
  context.textBaseline = "top";
  const every = width < 420 ? 10 : 5;
  for (let seconds = 0; seconds <= 30; seconds += every) {
    const x = Math.round(width * (1 - (seconds * 1000) / WINDOW_MS)) - (seconds === 0 ? 0.5 : -0.5);
    context.fillStyle = inks.line;
    context.fillRect(x, 0, 1, height);
    context.fillStyle = inks.soft;
    context.textAlign = seconds === 0 ? "right" : seconds === 30 ? "left" : "center";
    context.fillText(seconds === 0 ? t("lanes.now") : t("lanes.seconds", { seconds }), x, height + 5);
  }
}

/**
 * A field with a form of its own: a request's colour may be much like that of the field.
 * @param {CanvasRenderingContext2D} context @param {number} left @param {number} top @param {number} width
 * @param {number} height @param {string} colour
 */
function drawHatch(context, left, top, width, height, colour) {
  context.save();
  context.beginPath();
  context.rect(left, top, width, height);
  context.clip();
  context.globalAlpha = 0.5;
  context.strokeStyle = colour;
  context.lineWidth = 1;
  context.beginPath();
  for (let x = left - height; x < left + width; x += HATCH) {
    context.moveTo(x, top + height);
    context.lineTo(x + height, top);
  }
  context.stroke();
  context.restore();
}

export class LaneChart {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {LanesModel} model
   * @param {(key: number) => number} streamOf which of the page's own streams a request is; -1: none
   */
  constructor(canvas, model, streamOf) {
    this.canvas = canvas;
    this.model = model;
    this.streamOf = streamOf;
    this.right = 0; // the page's time at the right edge
    /** @type {Work|null} */
    this.marked = null;
  }

  /** @param {number} right @param {Inks} inks @param {any} t */
  draw(right, inks, t) {
    this.right = right;
    const height = this.model.lanes.length * LANE_HEIGHT;
    const { context, width } = fitted(this.canvas, height + AXIS_HEIGHT);
    drawTimes(context, width, height, inks, t);
    this.model.lanes.forEach((lane, index) => this.#drawLane(context, lane, index * LANE_HEIGHT, width, inks, t));
  }

  /** @param {CanvasRenderingContext2D} context @param {Lane} lane @param {number} top @param {number} width
   * @param {Inks} inks @param {any} t */
  #drawLane(context, lane, top, width, inks, t) {
    context.fillStyle = inks.line;
    context.fillRect(0, top + LANE_HEIGHT - 1, width, 1);
    context.globalAlpha = lane.lead ? 0.45 : 1;
    const numRows = this.#numRows(lane);
    for (const work of this.model.workOf(lane)) {
      const { left, right } = this.#span(work, width);
      if (right < 0 || left > width) continue;
      this.#drawWork(context, work, left, right, top, numRows, inks);
    }
    context.globalAlpha = 1;
    for (const gap of lane.gaps) this.#drawGap(context, gap, top, width, inks, t);
  }

  /** @param {Lane} lane */
  #numRows(lane) {
    return 1 + Math.max(0, ...this.model.workOf(lane).map((work) => work.row));
  }

  /** @param {Work} work @param {number} width */
  #span(work, width) {
    const start = work.start + work.clock.offset;
    const left = width * (1 - (this.right - start) / WINDOW_MS);
    const right = left + (width * work.duration) / WINDOW_MS;
    return { left, right: Math.max(left + MIN_WIDTH, Math.min(width, right)) };
  }

  /** @param {number} top @param {number} row @param {number} numRows */
  #box(top, row, numRows) {
    const each = (LANE_HEIGHT - 2 * PAD) / numRows;
    return { y: top + PAD + row * each, height: Math.max(2, each - (numRows > 1 ? 1 : 0)) };
  }

  /** @param {CanvasRenderingContext2D} context @param {Work} work @param {number} left @param {number} right
   * @param {number} top @param {number} numRows @param {Inks} inks */
  #drawWork(context, work, left, right, top, numRows, inks) {
    const { y, height } = this.#box(top, work.row, numRows);
    const requests = work.requests.length ? work.requests : [0];
    const stripe = height / requests.length;
    const alpha = context.globalAlpha;
    if (work.name === "fetch") context.globalAlpha = alpha * 0.35;
    requests.forEach((key, index) => {
      context.fillStyle = this.colour(key, inks);
      context.fillRect(left, y + index * stripe, right - left, Math.max(1, stripe - (stripe > 4 ? 0.5 : 0)));
    });
    context.globalAlpha = alpha;
    if (WITH_PREFILL.has(work.name)) {
      context.fillStyle = inks.text;
      context.fillRect(left, y, right - left, 3);
    }
    if (work === this.marked) {
      context.strokeStyle = inks.text;
      context.lineWidth = 2;
      context.strokeRect(left - 1, y - 1, right - left + 2, height + 2);
    }
  }

  /** @param {number} key @param {Inks} inks */
  colour(key, inks) {
    if (key === 0) return inks.others;
    const stream = this.streamOf(key);
    return stream >= 0 ? streamColour(stream, inks.theme) : requestColour(key, inks.theme);
  }

  /** @param {CanvasRenderingContext2D} context @param {{at: number, until: number|null}} gap @param {number} top
   * @param {number} width @param {Inks} inks @param {any} t */
  #drawGap(context, gap, top, width, inks, t) {
    const x = (/** @type {number} */ at) => width * (1 - (this.right - at) / WINDOW_MS);
    const left = x(gap.at);
    const right = Math.min(width, gap.until === null ? width : Math.max(x(gap.until), left + 2));
    if (right < 0) return;
    drawHatch(context, left, top + 1, right - left, LANE_HEIGHT - 2, inks.alert);
    context.fillStyle = inks.alert;
    context.fillRect(left, top + 1, 2, LANE_HEIGHT - 2);
    context.font = inks.font;
    context.textBaseline = "middle";
    context.textAlign = "left";
    const words = gap.until === null ? t("lanes.starting") : t("lanes.replaced");
    const space = context.measureText(words).width;
    const at = Math.min(left + 6, width - space - 4);
    context.fillStyle = inks.ground; // the words may reach beyond the field, onto work
    context.fillRect(at - 3, top + 4, space + 6, 17);
    context.fillStyle = inks.alert;
    context.fillText(words, at, top + 13);
  }

  /**
   * @param {number} x
   * @param {number} y
   * @returns {{lane: Lane, work: Work}|null}
   */
  at(x, y) {
    const lane = this.model.lanes[Math.floor(y / LANE_HEIGHT)];
    if (!lane) return null;
    const width = this.canvas.clientWidth;
    const top = this.model.lanes.indexOf(lane) * LANE_HEIGHT;
    const numRows = this.#numRows(lane);
    /** @type {Work|null} */
    let nearest = null;
    let least = POINTED;
    for (const work of this.model.workOf(lane)) {
      const { left, right } = this.#span(work, width);
      const box = this.#box(top, work.row, numRows);
      const away = Math.max(left - x, x - right, box.y - y, y - box.y - box.height, 0);
      if (away < least || (away === 0 && least === 0)) {
        nearest = work;
        least = away;
      }
    }
    return nearest && { lane, work: nearest };
  }

  /** @param {Lane} lane @param {Work} work the middle of what is seen of it */
  place(lane, work) {
    const width = this.canvas.clientWidth;
    const { left, right } = this.#span(work, width);
    const x = (Math.max(0, left) + Math.min(width, right)) / 2;
    return { x, y: (this.model.lanes.indexOf(lane) + 0.5) * LANE_HEIGHT };
  }

  /** @param {Lane} lane @returns {Work[]} what is seen of it, in order of time */
  seen(lane) {
    const width = this.canvas.clientWidth;
    return this.model
      .workOf(lane)
      .filter((work) => this.#span(work, width).right > 0 && this.#span(work, width).left < width)
      .toSorted((one, other) => one.start + one.clock.offset - other.start - other.clock.offset);
  }
}
