// Says what a piece of work is: to a pointer above it, and to the keyboard, which goes from one to the next.

import { element } from "../dom.js";

/** @typedef {import("./model.js").Lane} Lane */
/** @typedef {import("./model.js").Work} Work */

export class Pointing {
  /**
   * @param {HTMLElement} frame around the canvas; it takes the focus
   * @param {import("./lane_chart.js").LaneChart} chart
   * @param {(lane: Lane, work: Work) => string} describe
   * @param {{hold: () => void, release: () => void, redraw: () => void}} view
   */
  constructor(frame, chart, describe, view) {
    this.frame = frame;
    this.chart = chart;
    this.describe = describe;
    this.view = view;
    /** @type {{lane: Lane, work: Work}|null} */
    this.marked = null;
    this.tip = element("div", { class: "lanes-tip", role: "status", hidden: true });
    frame.append(this.tip);
    const canvas = chart.canvas;
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerdown", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => this.#mark(null));
    frame.addEventListener("keydown", (event) => this.#onKey(event));
    frame.addEventListener("blur", () => this.#leave());
  }

  /** @param {PointerEvent} event */
  #point(event) {
    const box = this.chart.canvas.getBoundingClientRect();
    const x = event.clientX - box.left;
    const y = event.clientY - box.top;
    const found = this.chart.at(x, y);
    this.#mark(found);
    if (found) this.#show(x, y);
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    if (event.key === "Escape" && this.marked) {
      this.#leave();
    } else if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(event.key)) {
      this.view.hold();
      this.#mark(this.#next(event.key));
      if (this.marked) {
        const { x, y } = this.chart.place(this.marked.lane, this.marked.work);
        this.#show(x, y);
      }
    } else {
      return;
    }
    event.preventDefault();
  }

  /** @param {string} key @returns {{lane: Lane, work: Work}|null} */
  #next(key) {
    const lanes = this.chart.model.lanes.filter((lane) => this.chart.seen(lane).length > 0);
    if (!lanes.length) return null;
    const marked = this.marked;
    if (!marked || !lanes.includes(marked.lane)) return lastOf(this.chart, lanes[0]);
    if (key === "ArrowUp" || key === "ArrowDown") {
      const index = lanes.indexOf(marked.lane) + (key === "ArrowDown" ? 1 : -1);
      const lane = lanes[Math.min(lanes.length - 1, Math.max(0, index))];
      return lane === marked.lane ? marked : nearestOf(this.chart, lane, marked.work);
    }
    const seen = this.chart.seen(marked.lane);
    const index = seen.indexOf(marked.work) + (key === "ArrowRight" ? 1 : -1);
    return { lane: marked.lane, work: seen[Math.min(seen.length - 1, Math.max(0, index))] };
  }

  /** @param {{lane: Lane, work: Work}|null} marked */
  #mark(marked) {
    this.marked = marked;
    this.chart.marked = marked && marked.work;
    this.tip.hidden = marked === null;
    const words = marked ? this.describe(marked.lane, marked.work) : "";
    if (marked && this.tip.textContent !== words) this.tip.textContent = words;
    this.view.redraw();
  }

  /** @param {number} x @param {number} y */
  #show(x, y) {
    const width = this.chart.canvas.clientWidth;
    const left = Math.max(0, Math.min(x + 12, width - this.tip.offsetWidth - 4));
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${y + 14}px`;
  }

  #leave() {
    this.#mark(null);
    this.view.release();
  }
}

/** @param {import("./lane_chart.js").LaneChart} chart @param {Lane} lane */
function lastOf(chart, lane) {
  const work = /** @type {Work} */ (chart.seen(lane).at(-1));
  return { lane, work };
}

/** @param {import("./lane_chart.js").LaneChart} chart @param {Lane} lane @param {Work} work */
function nearestOf(chart, lane, work) {
  const at = work.start + work.clock.offset;
  const away = (/** @type {Work} */ other) => Math.abs(other.start + other.clock.offset - at);
  const nearest = chart.seen(lane).reduce((one, other) => (away(other) < away(one) ? other : one));
  return { lane, work: nearest };
}
