// One turn of a chat: what it shows, and its buttons.

import { codeBlock } from "./code.js";
import { copyButton } from "./copy.js";
import { element, iconButton } from "./dom.js";
import { figuresLine } from "./figures.js";
import { t } from "./i18n.js";
import { MarkdownView } from "./markdown.js";
import { mediaView } from "./media.js";

/** @typedef {import("./store.js").Turn} Turn */
/**
 * @typedef {{edit: (turn: Turn, text: string) => void, regenerate: (turn: Turn) => void,
 *   inspect: (turn: Turn) => void, answerCalls: (turn: Turn, results: string[]) => void}} Actions
 */

const LEAST_MS = 80; // between two drawings of a growing answer
const NEXT_MS = 15; // between two parts of a drawing that is too long for one turn
const REST = 4; // a drawing takes at most one part in so many of the time
const LARGEST_JSON = 200_000; // characters of JSON that is written over several lines
const DEEPEST_JSON = 64;

/** @param {Turn} turn @param {Actions} actions */
export function messageView(turn, actions) {
  if (turn.role === "assistant") return new AnswerView(turn, actions);
  return turn.role === "tool" ? new ToolResultView(turn) : new QuestionView(turn, actions);
}

class QuestionView {
  /** @param {Turn} turn @param {Actions} actions */
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.element = element("article", { class: "turn question", "aria-label": t("turn.user") });
    this.draw();
  }

  draw() {
    const { turn } = this;
    const edit = iconButton("edit", t("edit"), () => this.edit(), { class: "edit" });
    this.element.replaceChildren(
      element(
        "div",
        { class: "bubble" },
        turn.media.length > 0 && element("div", { class: "media-row" }, ...turn.media.map(mediaView)),
        turn.text !== "" && element("p", { class: "said", text: turn.text }),
      ),
      element("div", { class: "turn-buttons" }, edit, copyButton(() => turn.text)),
    );
  }

  edit() {
    const field = element("textarea", { "aria-label": t("edit.label"), rows: "3" });
    field.value = this.turn.text;
    const cancel = () => {
      this.draw();
      /** @type {HTMLElement} */ (this.element.querySelector(".edit")).focus();
    };
    const form = element(
      "form",
      {
        class: "edit-form",
        on: {
          submit: (/** @type {Event} */ event) => {
            event.preventDefault();
            if (field.value.trim() || this.turn.media.length) this.actions.edit(this.turn, field.value.trim());
          },
          keydown: (/** @type {KeyboardEvent} */ event) => {
            if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
              event.preventDefault();
              form.requestSubmit();
            } else if (event.key === "Escape") {
              event.stopPropagation();
              cancel();
            }
          },
        },
      },
      field,
      element("p", { class: "hint", text: t("edit.note") }),
      element(
        "div",
        { class: "dialog-buttons" },
        element("button", { type: "button", class: "button", text: t("cancel"), on: { click: cancel } }),
        element("button", { type: "submit", class: "button primary", text: t("edit.send") }),
      ),
    );
    this.element.replaceChildren(form);
    field.focus();
  }

  update() {}
}

class ToolResultView {
  /** @param {Turn} turn */
  constructor(turn) {
    this.turn = turn;
    this.element = element(
      "article",
      { class: "turn tool-result", "aria-label": t("turn.tool", { name: turn.name ?? "" }) },
      element("h2", { class: "small-title", text: t("turn.tool", { name: turn.name ?? "" }) }),
      codeBlock(turn.text, isJson(turn.text) ? "json" : ""),
    );
  }

  update() {}
}

class AnswerView {
  /** @param {Turn} turn @param {Actions} actions */
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.text = new MarkdownView();
    this.thought = new MarkdownView();
    this.thoughts = element(
      "details",
      { class: "thoughts", hidden: true },
      element("summary", { text: t("thoughts") }),
      this.thought.element,
    );
    this.calls = element("div", { class: "calls" });
    this.foot = element("div", { class: "answer-foot" });
    this.waiting = element("div", { class: "waiting" }, element("i"), element("i"), element("i"));
    this.element = element(
      "article",
      { class: "turn answer", "aria-label": t("turn.assistant") },
      this.thoughts, this.text.element, this.calls, this.waiting, this.foot,
    );
    this.timer = 0;
    this.costMs = 0;
  }

  /** @param {boolean} isOver */
  update(isOver) {
    if (isOver) {
      clearTimeout(this.timer);
      this.timer = 0;
      this.draw(true);
    } else if (!this.timer) {
      this.timer = window.setTimeout(() => {
        this.timer = 0;
        this.draw(false);
      }, Math.max(LEAST_MS, REST * this.costMs));
    }
  }

  /** @param {boolean} isOver */
  draw(isOver) {
    const before = performance.now();
    const { turn } = this;
    this.element.setAttribute("aria-busy", String(!isOver));
    this.waiting.hidden = isOver || turn.text !== "";
    this.thoughts.hidden = !turn.thoughts;
    let isShown = !turn.thoughts || this.thought.show(turn.thoughts, isOver);
    const object = isOver ? asObject(turn.text) : null;
    if (object) this.text.element.replaceWith((this.text.element = codeBlock(object, "json")));
    else isShown = this.text.show(turn.text, isOver) && isShown;
    if (!isShown) {
      // The rest comes in turns of its own, so that the page reacts meanwhile.
      clearTimeout(this.timer);
      this.timer = window.setTimeout(() => {
        this.timer = 0;
        this.draw(isOver);
      }, NEXT_MS);
    } else if (turn.calls?.length) this.drawCalls(turn.calls, isOver);
    if (isOver && isShown) this.drawFoot();
    this.costMs = performance.now() - before;
    this.element.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
  }

  /** @param {import("./store.js").Call[]} calls @param {boolean} isOver */
  drawCalls(calls, isOver) {
    const shown = calls.map((call) =>
      element(
        "div",
        { class: "call" },
        element("h2", { class: "small-title", text: t("call", { name: call.name }) }),
        codeBlock(pretty(call.arguments), "json"),
      ),
    );
    this.calls.replaceChildren(...shown);
    if (isOver && !this.turn.error) this.calls.append(this.resultsForm(calls));
  }

  /** Takes the results of the calls, so that the model can go on. @param {import("./store.js").Call[]} calls */
  resultsForm(calls) {
    const fields = calls.map((call) => element("textarea", { rows: "2", "aria-label": t("call.result", { name: call.name }) }));
    return element(
      "form",
      {
        class: "results",
        on: {
          submit: (/** @type {Event} */ event) => {
            event.preventDefault();
            this.actions.answerCalls(this.turn, fields.map((field) => field.value));
          },
        },
      },
      ...calls.flatMap((call, index) => [
        element("span", { class: "small-title", "aria-hidden": "true", text: t("call.result", { name: call.name }) }),
        fields[index],
      ]),
      element("button", { type: "submit", class: "button primary", text: t("call.send") }),
    );
  }

  drawFoot() {
    const { turn } = this;
    this.foot.replaceChildren(
      ...[
        turn.error && element("p", { class: "error", text: turn.error }),
        element(
          "div",
          { class: "turn-buttons" },
          turn.text !== "" && copyButton(() => turn.text),
          iconButton("retry", t("regenerate"), () => this.actions.regenerate(turn), { class: "regenerate" }),
          iconButton("braces", t("inspect"), () => this.actions.inspect(turn), { class: "inspect" }),
        ),
        figuresLine(turn),
      ].filter((part) => part),
    );
  }
}

/** @param {string} text */
function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

/** @param {string} text @returns {string} the same JSON over several lines; what is none, or too large, stays */
function pretty(text) {
  return fitsLines(text) && isJson(text) ? JSON.stringify(JSON.parse(text), null, 2) : text;
}

/** @param {string} text @returns {string|null} the JSON of an answer that is a whole object or list */
function asObject(text) {
  const trimmed = text.trim();
  return /^[{[]/.test(trimmed) && fitsLines(trimmed) && isJson(trimmed) ? pretty(trimmed) : null;
}

/**
 * Each level of JSON is indented further: deep JSON over several lines is as long as the square of its depth.
 * @param {string} text
 */
function fitsLines(text) {
  if (text.length > LARGEST_JSON) return false;
  let depth = 0;
  for (const mark of text.matchAll(/[[{\]}]/g)) {
    depth += "[{".includes(mark[0]) ? 1 : -1;
    if (depth > DEEPEST_JSON) return false;
  }
  return true;
}
