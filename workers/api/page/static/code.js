// A block of code: its language, a button that copies it, and colours once it has come to rest.

import { copyButton } from "./copy.js";
import { element } from "./dom.js";
import { t } from "./i18n.js";

const MOST_COLOURED = 10_000; // characters
const LONGEST_COLOURED = 300; // characters of a line: some grammars take the square of a line's length, or more
// What people write behind the fence, and the grammar that reads it.
const GRAMMARS = {
  bash: "bash", sh: "bash", shell: "bash", console: "bash", c: "c", h: "c", cpp: "cpp", "c++": "cpp", css: "css",
  diff: "diff", go: "go", html: "xml", java: "java", javascript: "javascript", js: "javascript", mjs: "javascript",
  json: "json", jsonc: "json", markdown: "markdown", md: "markdown", python: "python", py: "python", rs: "rust",
  rust: "rust", sql: "sql", svg: "xml", ts: "typescript", typescript: "typescript", xml: "xml", yaml: "yaml",
  yml: "yaml",
};
/** @type {Map<string, Promise<any>>} */
const loading = new Map();

/**
 * @param {string} text
 * @param {string} info what stands behind the fence
 */
export function codeBlock(text, info) {
  const name = info.trim().split(/\s/)[0].slice(0, 40);
  const code = element("code", { text });
  const label = name || t("code");
  const head = element("div", { class: "code-head" }, element("span", { text: label }), copyButton(() => text));
  // It scrolls, so the keyboard must reach it.
  const body = element("pre", { tabindex: "0", role: "region", "aria-label": label }, code);
  const grammar = Object.hasOwn(GRAMMARS, name.toLowerCase())
    ? GRAMMARS[/** @type {"bash"} */ (name.toLowerCase())]
    : null;
  if (grammar && isQuick(text)) colour(code, text, grammar);
  return element("div", { class: "code" }, head, body);
}

/** @param {string} text @returns {boolean} whether its colours cost little, whatever it says */
function isQuick(text) {
  return text.length <= MOST_COLOURED && text.split("\n").every((line) => line.length <= LONGEST_COLOURED);
}

/** @param {string} grammar @returns {Promise<any>} the library, which knows the grammar then */
function load(grammar) {
  let loaded = loading.get(grammar);
  if (!loaded) {
    loaded = Promise.all([
      import("./vendor/highlight.js"),
      import(`./vendor/highlight-${grammar}.js`),
    ]).then(([library, rules]) => {
      library.default.registerLanguage(grammar, rules.default);
      return library.default;
    });
    loading.set(grammar, loaded);
  }
  return loaded;
}

/** @param {HTMLElement} code @param {string} text @param {string} grammar */
async function colour(code, text, grammar) {
  let tree;
  try {
    const library = await load(grammar);
    // The library's tree, not its markup: that is never made.
    tree = library.highlight(text, { language: grammar, ignoreIllegals: true })._emitter.rootNode;
  } catch {
    return; // without colours
  }
  code.replaceChildren(...tree.children.map(coloured));
}

/** @param {any} node @returns {Node} */
function coloured(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const scope = String(node.scope ?? "").split(".")[0];
  return element("span", { class: scope && `hl-${scope}` }, ...node.children.map(coloured));
}
