// The page's language: strings by key, with {names} for values.

import { strings } from "./strings.js";
import { choices } from "./settings.js";

export const LANGUAGES = { en: "English", zh: "中文" };

/** @returns {"en"|"zh"} the chosen language, else the browser's */
export function language() {
  const chosen = choices.get("language");
  if (chosen === "en" || chosen === "zh") return chosen;
  return (navigator.language || "").toLowerCase().startsWith("zh") ? "zh" : "en";
}

/** @param {"en"|"zh"} chosen */
export function setLanguage(chosen) {
  choices.set("language", chosen);
}

/**
 * Adds the strings of a view, which come with its module.
 * @param {{en: Object<string, string>, zh: Object<string, string>}} further
 */
export function addStrings(further) {
  for (const name of /** @type {const} */ (["en", "zh"])) Object.assign(strings[name], further[name]);
}

/**
 * @param {string} name
 * @param {Object<string, string|number>} [values]
 * @returns {string}
 */
export function t(name, values = {}) {
  const text = strings[language()][name] ?? strings.en[name] ?? name;
  return text.replace(/\{(\w+)\}/g, (whole, part) => String(values[part] ?? whole));
}
