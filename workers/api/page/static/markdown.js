// Shows Markdown that grows while it streams.
//
// The text becomes tokens (vendor/marked.js, its lexer only) and the tokens become elements. No markup is made or
// read on the way, so nothing in a text can run: HTML is shown as text, a picture as a link, and a link only
// leads to http, https or mailto. What is finished is not touched again, so that a long answer costs no more at its
// end than at its start; what is too large for Markdown is shown as it is written.

import { lexer } from "./vendor/marked.js";
import { codeBlock } from "./code.js";
import { element } from "./dom.js";

const MOST_MARKDOWN = 200_000; // characters of a text that become Markdown
const LARGEST_BLOCK = 20_000; // characters: beyond, one block would take too long each time it grows
const FIRST_PART = 1_250; // characters that the lexer is given at first: some texts take it the square of them, or more
const MOST_CELLS = 2_000; // of a table
const DEEPEST = 24; // levels of quotes and lists
const PIECE = 16_000; // characters of plain text in one element: the browser lays out only what is in sight
const SLOW_MS = 150; // a block that takes longer is not tried again
const TURN_MS = 50; // of one call: what is left waits for the next

export class MarkdownView {
  constructor() {
    this.element = element("div", { class: "markdown" });
    this.tail = element("div", { class: "markdown-tail" });
    this.element.append(this.tail);
    this.settled = 0; // characters whose elements are final
    this.part = FIRST_PART; // what the lexer is given: twice as much while no block ends in it and it is quick
    this.plainEnd = 0; // characters that are shown as they are written, and those before
    this.isPlain = false;
    this.shown = "";
  }

  /** Begins anew, for another text. */
  clear() {
    this.tail.replaceChildren();
    this.tail.classList.remove("plain");
    this.element.replaceChildren(this.tail);
    this.settled = this.plainEnd = 0;
    this.part = FIRST_PART;
    this.isPlain = false;
  }

  /**
   * @param {string} text all of it
   * @param {boolean} isWhole whether no more will come
   * @returns {boolean} whether all of it is shown; else the caller shall call again soon
   */
  show(text, isWhole) {
    if (!text.startsWith(this.shown)) this.clear();
    this.shown = text;
    if (!this.isPlain && !this.showMarkdown(text, isWhole)) return false;
    if (this.isPlain) this.showPlain(text);
    return true;
  }

  /** @param {string} text @param {boolean} isWhole @returns {boolean} */
  showMarkdown(text, isWhole) {
    const room = Math.min(text.length, MOST_MARKDOWN);
    const begun = performance.now();
    while (this.settled < room || isWhole) {
      const end = Math.min(text.length, this.settled + this.part);
      const isLast = end === text.length;
      const before = performance.now();
      const tokens = tokensOf(text.slice(this.settled, end));
      const isSlow = performance.now() - before > SLOW_MS;
      // The last two blocks may still change: a list may go on behind an empty line.
      const numFinal = isLast && isWhole ? tokens.length : Math.max(0, tokens.length - 2);
      const final = tokens.slice(0, numFinal);
      this.tail.before(...final.map((token) => blockOf(token, 0)).filter(Boolean));
      this.settled += final.reduce((sum, token) => sum + token.raw.length, 0);
      if (isLast) {
        this.tail.replaceChildren(...tokens.slice(numFinal).map((token) => blockOf(token, 0)).filter(Boolean));
      }
      const hasEnd = isLast || numFinal > 0;
      if (isSlow || (!hasEnd && this.part >= LARGEST_BLOCK) || (this.settled >= MOST_MARKDOWN && !isLast)) {
        this.isPlain = true;
      }
      this.part = hasEnd ? FIRST_PART : 2 * this.part;
      if (isLast || this.isPlain) break;
      if (performance.now() - begun > TURN_MS) return false;
    }
    if (this.settled >= MOST_MARKDOWN && this.settled < text.length) this.isPlain = true;
    if (this.isPlain) {
      this.tail.replaceChildren();
      this.tail.classList.add("plain");
      this.plainEnd = this.settled;
    }
    return true;
  }

  /** Adds what has come since. @param {string} text */
  showPlain(text) {
    let from = this.plainEnd;
    while (from < text.length) {
      const last = this.tail.lastElementChild;
      if (last && (last.textContent?.length ?? 0) < PIECE) {
        const more = text.slice(from, from + PIECE - (last.textContent?.length ?? 0));
        last.append(more);
        from += more.length;
      } else {
        this.tail.append(element("div", { class: "plain-piece" }));
      }
    }
    this.plainEnd = from;
  }
}

/** @param {string} text @returns {any[]} marked's tokens, whose `raw` together is the text */
function tokensOf(text) {
  try {
    const tokens = lexer(text);
    if (tokens.reduce((sum, token) => sum + token.raw.length, 0) === text.length) return tokens;
  } catch {
    // Nested deeper than the lexer can follow.
  }
  return [{ type: "plain", raw: text }];
}

/** @param {any[]} tokens @param {number} depth @returns {Node[]} */
function blocksOf(tokens, depth) {
  if (depth > DEEPEST) return [document.createTextNode(tokens.map((token) => token.raw).join(""))];
  return tokens.map((token) => blockOf(token, depth)).filter((block) => block !== null);
}

/** @param {any} token @param {number} depth @returns {any} */
function blockOf(token, depth) {
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "heading":
      // The page's own heading stands above those of an answer.
      return element(`h${Math.min(6, token.depth + 1)}`, {}, ...inlines(token.tokens));
    case "paragraph":
      return element("p", {}, ...inlines(token.tokens));
    case "code":
      return codeBlock(token.text, token.lang ?? "");
    case "blockquote":
      return element("blockquote", {}, ...blocksOf(token.tokens, depth + 1));
    case "list":
      return listOf(token, depth);
    case "table":
      return tableOf(token);
    case "hr":
      return element("hr");
    case "text":
      return element("span", {}, ...inlines(token.tokens ?? [token]));
    case "checkbox":
      return checkbox(token.checked);
    default: // html among them
      return element("div", { class: "plain", text: token.raw });
  }
}

/** @param {any} token @param {number} depth */
function listOf(token, depth) {
  // "427." is a number, and no list without anything in it.
  if (token.items.every((/** @type {any} */ item) => !item.text)) return element("p", { text: token.raw.trim() });
  const start = token.ordered && Number.isInteger(token.start) ? token.start : null;
  return element(
    token.ordered ? "ol" : "ul",
    { start: start === 1 ? null : start },
    ...token.items.map((/** @type {any} */ item) => element("li", {}, ...blocksOf(item.tokens, depth + 1))),
  );
}

/** @param {boolean} isChecked */
function checkbox(isChecked) {
  return element("span", { class: "checkbox", text: isChecked ? "☑ " : "☐ " });
}

/** @param {any} token */
function tableOf(token) {
  if (token.header.length * (token.rows.length + 1) > MOST_CELLS) {
    return element("div", { class: "plain plain-table", text: token.raw });
  }
  const cell = (/** @type {string} */ tag) => (/** @type {any} */ one, /** @type {number} */ column) =>
    element(tag, { class: token.align[column] && `align-${token.align[column]}` }, ...inlines(one.tokens));
  const head = element("thead", {}, element("tr", {}, ...token.header.map(cell("th"))));
  const rows = token.rows.map((/** @type {any[]} */ row) => element("tr", {}, ...row.map(cell("td"))));
  // It scrolls, so the keyboard must reach it.
  const table = element("table", {}, head, element("tbody", {}, ...rows));
  return element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "table" }, table);
}

/** @param {any[]|undefined} tokens @param {number} [depth] @returns {Node[]} */
function inlines(tokens, depth = 0) {
  if (depth > DEEPEST) return [document.createTextNode((tokens ?? []).map((token) => token.raw).join(""))];
  return (tokens ?? []).map((token) => inline(token, depth));
}

/** @param {any} token @param {number} depth @returns {Node} */
function inline(token, depth) {
  switch (token.type) {
    case "strong":
    case "em":
    case "del":
      return element(token.type, {}, ...inlines(token.tokens, depth + 1));
    case "codespan":
      return element("code", { text: token.text });
    case "br":
      return element("br");
    case "link":
      return link(token.href, inlines(token.tokens, depth + 1));
    case "image":
      // A picture from elsewhere would tell its host that somebody reads this.
      return link(token.href, [document.createTextNode(`🖼 ${token.text || token.href}`)]);
    case "escape":
      return document.createTextNode(token.text);
    case "checkbox":
      return checkbox(token.checked);
    case "text":
      return token.tokens
        ? element("span", {}, ...inlines(token.tokens, depth + 1))
        : document.createTextNode(unescaped(token.raw));
    default: // html among them
      return document.createTextNode(token.raw);
  }
}

/** @param {string} href @param {Node[]} content */
function link(href, content) {
  let address;
  try {
    address = new URL(href);
  } catch {
    address = null; // relative addresses would be those of this server
  }
  if (!address || !["http:", "https:", "mailto:"].includes(address.protocol)) {
    return element("span", { class: "dead-link", title: href.slice(0, 200) }, ...content);
  }
  // The address is shown: what a link says may not be where it leads.
  return element(
    "a",
    { href: address.href, title: address.href.slice(0, 200), target: "_blank", rel: "noopener noreferrer nofollow" },
    ...content,
  );
}

const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'", nbsp: "\u00a0" };

/** The lexer leaves entities to the browser, which sees text only. @param {string} text */
function unescaped(text) {
  return text.replace(/&(amp|lt|gt|quot|#39|nbsp);/g, (_, name) => ENTITIES[/** @type {"amp"} */ (name)]);
}
