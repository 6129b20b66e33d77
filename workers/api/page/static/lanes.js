// The view of the lanes: what each process has done in the last 30 seconds, live, and a load to see it by.

import { announce, element, iconButton } from "./dom.js";
import { inks } from "./lanes/colours.js";
import { Demo, NUM_PICTURES, NUM_STREAMS } from "./lanes/demo.js";
import { LanesFeed } from "./lanes/feed.js";
import { killWorker } from "./lanes/kill.js";
import { LaneChart, LANE_HEIGHT } from "./lanes/lane_chart.js";
import { Latencies } from "./lanes/latency.js";
import { colourLegend, legend } from "./lanes/legend.js";
import { LanesModel } from "./lanes/model.js";
import { Pointing } from "./lanes/pointing.js";
import { lanesTable, latencyTable, number, workInWords } from "./lanes/words.js";

export { strings } from "./lanes/strings.js";
export const ignoresTheme = true; // its colours are asked for anew
const BEHIND_MS = 500; // the right edge lies so far back: work is told a little after it was done
const WORDS_EVERY_MS = 1000;
const FRESH_MS = 2000; // after the last news each frame is drawn, later only some
const SLOW_FRAME_MS = 250;

/**
 * @param {HTMLElement} place
 * @param {any} context of the shell: main.js
 * @returns {Promise<() => void>}
 */
export async function mount(place, context) {
  await styleSheet();
  const view = new LanesView(place, context);
  return () => view.unmount();
}

/** The view's own style, loaded with its first showing. */
function styleSheet() {
  if (document.getElementById("lanes-style")) return Promise.resolve();
  const link = element("link", { id: "lanes-style", rel: "stylesheet", href: "/page/lanes.css" });
  document.head.append(link);
  return new Promise((resolve) => {
    link.addEventListener("load", resolve);
    link.addEventListener("error", resolve);
  });
}

class LanesView {
  /** @param {HTMLElement} place @param {any} context */
  constructor(place, context) {
    this.context = context;
    this.t = context.t;
    this.model = new LanesModel();
    this.latencies = new Latencies();
    /** @type {Demo|null} */
    this.demo = null;
    /** @type {number|null} the page's time at the right edge while the picture is held */
    this.heldAt = null;
    this.isHeldByButton = false;
    this.drawnAt = 0;
    this.namesShown = "";
    this.ink = inks();
    this.reducesMotion = matchMedia("(prefers-reduced-motion: reduce)");
    this.#build(place);
    this.chart = new LaneChart(this.canvas, this.model, (key) => this.streamOf(key));
    const describe = (/** @type {any} */ lane, /** @type {any} */ work) =>
      workInWords(this.model, lane, work, (key) => this.streamOf(key), context);
    this.pointing = new Pointing(this.frame, this.chart, describe, {
      hold: () => (this.heldAt ??= performance.now() - BEHIND_MS),
      release: () => {
        if (!this.isHeldByButton) this.heldAt = null;
      },
      redraw: () => (this.drawnAt = 0),
    });
    this.feed = new LanesFeed(context.request, this.model, {
      onState: (state) => this.#showState(state),
      onEvent: () => this.#onEvent(),
      onError: context.onError,
    });
    this.words = setInterval(() => this.#write(), WORDS_EVERY_MS);
    this.frameRequest = requestAnimationFrame((now) => this.#onFrame(now));
    this.#write();
  }

  unmount() {
    this.demo?.stop();
    this.feed.end();
    clearInterval(this.words);
    cancelAnimationFrame(this.frameRequest);
  }

  /** @param {number} key of a request */
  streamOf(key) {
    const request = this.model.requests.get(key);
    return request && this.demo ? this.demo.streamOf(request.id) : -1;
  }

  // What stands on the view.

  /** @param {HTMLElement} place */
  #build(place) {
    const { t } = this;
    this.startButton = element("button", {
      type: "button", class: "button primary", id: "lanes-demo", text: t("lanes.start"), on: { click: () => this.#toggleDemo() },
    });
    this.holdButton = element("button", {
      type: "button", class: "button", id: "lanes-hold", "aria-pressed": "false", text: t("lanes.pause"),
      on: { click: () => this.#toggleHold() },
    });
    this.status = element("p", { class: "lanes-status", role: "status" });
    this.names = element("ul", { class: "lanes-names", "aria-label": t("lanes.title") });
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.frame = element(
      "div",
      { class: "lanes-frame", tabindex: "0", role: "group", "aria-label": t("lanes.chart"), "aria-describedby": "lanes-keys" },
      this.canvas,
    );
    this.latencyCanvas = element("canvas", { role: "img", "aria-label": t("lanes.latency") });
    this.latencyHint = element("p", { class: "hint", text: t("lanes.latency.none") });
    this.latencyPlace = element("div", { class: "lanes-latency", hidden: true }, this.latencyCanvas);
    this.figures = element("div", { class: "lanes-scroll" });
    this.notes = element("p", { class: "hint", id: "lanes-notes" });
    this.table = element("div", { class: "lanes-scroll" });
    this.legend = legend(t);
    this.details = element(
      "details",
      { class: "lanes-words", on: { toggle: () => this.#write() } },
      element("summary", { text: t("lanes.table") }),
      this.table,
    );
    place.append(
      element(
        "div",
        { class: "lanes" },
        element("h1", { text: t("lanes.title") }),
        element("p", { class: "lanes-note", text: t("lanes.note") }),
        element("div", { class: "lanes-controls" }, this.startButton, this.holdButton, this.status),
        element("section", { class: "lanes-chart", "aria-label": t("lanes.chart") }, this.names, this.frame),
        this.legend,
        element("p", { class: "hint", id: "lanes-keys", text: t("lanes.keys") }),
        this.notes,
        element("h2", { text: t("lanes.latency") }),
        this.latencyHint,
        element("div", { class: "lanes-below" }, this.latencyPlace),
        this.figures,
        this.details,
      ),
    );
  }

  /** The names on the left, when the lanes or their states have changed. */
  #drawNames() {
    const { model, t } = this;
    const shown = JSON.stringify([model.kill, model.lanes.map((lane) => [lane.worker, lane.epoch, lane.isReady])]);
    if (this.namesShown === shown) return;
    this.namesShown = shown;
    const focused = document.activeElement?.getAttribute("data-worker");
    this.names.replaceChildren(...model.lanes.map((lane) => this.#name(lane)));
    const again = [...this.names.querySelectorAll("button")].find((button) => button.dataset.worker === focused);
    if (focused) again?.focus();
    const notes = [];
    if (model.sees === "own") notes.push(t("lanes.sees.own"));
    if (model.kill === "off") notes.push(t("lanes.kill.off"));
    this.notes.textContent = notes.join(" ");
  }

  /** @param {import("./lanes/model.js").Lane} lane */
  #name(lane) {
    const { t, model } = this;
    const worker = lane.worker;
    const state = lane.isReady ? (lane.lead ? t("lanes.with", { worker: lane.lead }) : t("lanes.ready")) : t("lanes.starting");
    const row = element(
      "li",
      { class: lane.isReady ? "" : "starting" },
      element("span", { class: "lane-name", text: worker }),
      element("span", { class: "lane-state", text: lane.epoch > 1 ? `${state}, ${t("lanes.replaced.times", { times: lane.epoch - 1 })}` : state }),
      model.kill !== "off" &&
        iconButton("close", t("lanes.kill", { worker }), () => this.#kill(worker), {
          class: "lane-kill", "data-worker": worker, "aria-disabled": !lane.isReady && "true",
        }),
    );
    row.style.height = `${LANE_HEIGHT}px`;
    return row;
  }

  // What happens.

  /** @param {import("./lanes/feed.js").FeedState} state */
  #showState(state) {
    this.feedState = state;
    this.#write();
  }

  #onEvent() {
    this.#drawNames();
    if (!this.drawnOnce) this.#write();
  }

  /** @param {string} worker */
  async #kill(worker) {
    try {
      const isKilled = await killWorker(worker, this.model.kill !== "allowed", this.context);
      if (isKilled) announce(this.t("lanes.kill.done", { worker }));
    } catch (error) {
      this.context.onError(error);
    }
  }

  #toggleHold() {
    this.isHeldByButton = !this.isHeldByButton;
    this.heldAt = this.isHeldByButton ? performance.now() - BEHIND_MS : null;
    this.holdButton.textContent = this.t(this.isHeldByButton ? "lanes.resume" : "lanes.pause");
    this.holdButton.setAttribute("aria-pressed", String(this.isHeldByButton));
  }

  async #toggleDemo() {
    if (this.demo?.isRunning) {
      this.demo.stop();
      return;
    }
    this.latencies = new Latencies();
    this.latencyHint.hidden = true;
    this.latencyPlace.hidden = false;
    this.progress = null;
    const demo = new Demo(
      this.context.request,
      {
        onToken: (stream, phase) => this.latencies.add(stream, performance.now(), phase),
        onProgress: (progress) => {
          this.progress = progress;
          this.latencies.during(demo.phase, performance.now());
          this.#write();
        },
      },
      this.t("lanes.demo.question"),
    );
    this.demo = demo;
    this.startButton.textContent = this.t("lanes.stop");
    try {
      await demo.run();
    } catch (error) {
      this.context.onError(error);
    }
    this.startButton.textContent = this.t("lanes.start");
    this.#write();
  }

  // What is drawn, and written, again and again.

  /** @param {number} now */
  #onFrame(now) {
    this.frameRequest = requestAnimationFrame((next) => this.#onFrame(next));
    const isFresh = now - this.model.changedAt < FRESH_MS || Boolean(this.demo?.isRunning);
    const isStill = this.heldAt !== null || !this.model.hasWork(now);
    const wait = isStill || this.reducesMotion.matches ? WORDS_EVERY_MS : isFresh ? 0 : SLOW_FRAME_MS;
    if (this.drawnAt && now - this.drawnAt < wait) return;
    this.drawnAt = now;
    const right = this.heldAt ?? now - BEHIND_MS;
    this.chart.draw(right, this.ink, this.t);
    if (!this.latencyPlace.hidden) this.latencies.draw(this.latencyCanvas, right, this.ink, this.t);
  }

  /** Once a second: all that is text. */
  #write() {
    const now = performance.now();
    const { t, context } = this;
    const before = this.ink.theme;
    this.ink = inks();
    if (before !== this.ink.theme || !this.drawnOnce) colourLegend(this.legend, this.ink);
    this.drawnOnce = true;
    this.#drawNames();
    const words = this.#statusText(now);
    if (this.status.textContent !== words) this.status.textContent = words; // else it would be read out again
    if (!this.latencyPlace.hidden) {
      this.figures.replaceChildren(latencyTable(this.latencies, context));
      const median = this.latencies.median(now);
      const middle = median === null ? "" : t("lanes.table.median", { ms: number(median, context.language, 1) });
      this.latencyCanvas.setAttribute("aria-label", `${t("lanes.latency")}. ${middle}`);
    }
    if (this.details.open) this.table.replaceChildren(lanesTable(this.model, now, context));
  }

  /** @param {number} now */
  #statusText(now) {
    const { t, progress } = this;
    if (this.feedState === "lost") return t("lanes.lost");
    if (progress) {
      const values = { done: progress.done, total: NUM_PICTURES, streams: NUM_STREAMS, seconds: progress.seconds };
      return t(`lanes.demo.${progress.state}`, values);
    }
    if (!this.model.lanes.length) return t("lanes.connecting");
    if (this.model.numDropped) return t("lanes.dropped");
    return this.model.hasWork(now) ? "" : t("lanes.idle");
  }
}
