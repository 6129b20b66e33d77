// The line of figures below an answer: times, tokens, and what came from which cache.

import { element } from "./dom.js";
import { language, t } from "./i18n.js";

/** @param {number} value @param {number} digits */
function number(value, digits = 0) {
  return value.toLocaleString(language(), { maximumFractionDigits: digits, minimumFractionDigits: digits });
}

/** @param {import("./store.js").Turn} turn @returns {HTMLElement|null} */
export function figuresLine(turn) {
  const { figures, finish } = turn;
  if (!figures) return null;
  /** @type {[string, string, string][]} class, text, title */
  const shown = [];
  if (figures.ttft !== null) {
    shown.push(["ttft", t("figure.ttft", { seconds: number(figures.ttft, 2) }), t("figure.ttft.title")]);
  }
  if (figures.rate !== null) {
    shown.push(["rate", t("figure.rate", { rate: number(figures.rate, 1) }), t("figure.rate.title")]);
  }
  if (figures.output) {
    const output = t("figure.output", { tokens: number(figures.output) });
    const thoughts = figures.thoughts ? t("figure.thoughts", { tokens: number(figures.thoughts) }) : "";
    shown.push(["output", output + thoughts, t("figure.output.title")]);
  }
  if (figures.prompt) {
    const prompt = t("figure.prompt", { tokens: number(figures.prompt) });
    shown.push(["prompt", prompt, t("figure.prompt.title")]);
    const pictures = figures.media?.prefix_cached ?? 0;
    const cached =
      t("figure.cached", { tokens: number(figures.cached) }) +
      (pictures ? t("figure.prefix_cached", { tokens: number(pictures) }) : "");
    shown.push([figures.cached ? "cached hit" : "cached", cached, t("figure.cached.title")]);
  }
  if (figures.media) shown.push(...mediaFigures(figures.media));
  if (finish === "length" || finish === "stopped") {
    shown.push(["finish", t(`finish.${finish}`), t(`finish.${finish}`)]);
  }
  return element(
    "ul",
    { class: "figures", "aria-label": t("figures") },
    ...shown.map(([kind, text, title]) => element("li", { class: kind, text, title })),
  );
}

/** @param {Object<string, number>} media @returns {[string, string, string][]} */
function mediaFigures(media) {
  return /** @type {[string, string, string][]} */ (
    [
      ["encoded", "encoded"],
      ["vit_cached", "vit-cached hit"],
    ]
      .filter(([name]) => media[name])
      .map(([name, kind]) => [kind, t(`figure.${name}`, { tokens: number(media[name]) }), t(`figure.${name}.title`)])
  );
}
