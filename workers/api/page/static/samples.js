// Pictures that come with the model, each with questions that it can answer: one click shows an answer.

import { element } from "./dom.js";
import { language, t } from "./i18n.js";

/**
 * @param {{file: string, name: Object<string, string>, questions: Object<string, string[]>}[]} samples
 * @param {(file: File, question: string) => void} ask
 * @returns {HTMLElement}
 */
export function samplesView(samples, ask) {
  return element("ul", { class: "samples" }, ...samples.map((sample) => card(sample, ask)));
}

/** Its first frame; it plays while somebody points at it. @param {string} url @param {string} name */
function film(url, name) {
  const shown = element("video", { src: url, muted: true, loop: true, playsinline: true, preload: "metadata", "aria-label": name });
  shown.muted = true; // the attribute alone does not count for elements that scripts make
  shown.addEventListener("pointerenter", () => shown.play());
  shown.addEventListener("pointerleave", () => shown.pause());
  return shown;
}

/** @param {any} sample @param {(file: File, question: string) => void} ask */
function card(sample, ask) {
  const url = `/page/samples/${encodeURIComponent(sample.file)}`;
  const name = sample.name[language()] ?? sample.name.en;
  const questions = sample.questions[language()] ?? sample.questions.en;
  const start = async (/** @type {string} */ question) => {
    const blob = await (await fetch(url)).blob();
    ask(new File([blob], sample.file, { type: blob.type }), question);
  };
  return element(
    "li",
    { class: "sample" },
    sample.file.endsWith(".mp4") ? film(url, name) : element("img", { src: url, alt: name, loading: "lazy" }),
    element(
      "div",
      { class: "sample-questions" },
      ...questions.map((/** @type {string} */ question) =>
        element("button", { type: "button", text: question, title: t("sample.ask", { name }), on: { click: () => start(question) } }),
      ),
    ),
  );
}
