// Copies texts.

import { announce, icon, iconButton } from "./dom.js";
import { t } from "./i18n.js";

const SHOWN_MS = 1500;

/** @param {string} text @returns {Promise<boolean>} whether it is on the clipboard */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // plain http from another machine has no clipboard
  }
}

/** @param {string} text @returns {boolean} */
function copyBySelection(text) {
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "visually-hidden";
  const place = document.querySelector("dialog[open]") ?? document.body;
  const before = /** @type {HTMLElement|null} */ (document.activeElement);
  place.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  before?.focus();
  return isDone;
}

/** @param {() => string} text */
export function copyButton(text) {
  const button = iconButton("copy", t("copy"), async () => {
    if (!(await copy(text()))) return;
    button.replaceChildren(icon("check"));
    announce(t("copied"));
    setTimeout(() => button.replaceChildren(icon("copy")), SHOWN_MS);
  });
  return button;
}
