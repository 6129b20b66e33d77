// Dialogs that ask one thing. The browser keeps the focus inside, and Escape closes them.

import { element, iconButton } from "./dom.js";
import { codeBlock } from "./code.js";
import { t } from "./i18n.js";

/**
 * @param {string} title
 * @param {Node[]} content
 * @param {string} okText
 * @returns {Promise<boolean>}
 */
function ask(title, content, okText) {
  const form = element(
    "form",
    { method: "dialog" },
    element("h2", { id: "dialog-title", text: title }),
    ...content,
    element(
      "div",
      { class: "dialog-buttons" },
      element("button", { type: "button", class: "button", text: t("cancel"), on: { click: () => dialog.close("") } }),
      element("button", { type: "submit", value: "ok", class: "button primary", text: okText }),
    ),
  );
  const dialog = element("dialog", { class: "dialog", "aria-labelledby": "dialog-title" }, form);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "ok");
      dialog.remove();
    });
  });
}

/** @param {string} title @param {string} text @param {string} okText */
export function confirmDialog(title, text, okText) {
  return ask(title, [element("p", { text })], okText);
}

/**
 * @param {string} title
 * @param {string} label
 * @param {string} value
 * @returns {Promise<string>} empty if the user has left
 */
export async function textDialog(title, label, value) {
  const field = element("input", { type: "text", id: "dialog-field", maxlength: "200", autofocus: true });
  field.value = value;
  const isGiven = await ask(title, [element("label", { for: "dialog-field", text: label }), field], t("save"));
  return isGiven ? field.value.trim() : "";
}

/** @param {string} title @param {string} text @param {string} language of the code */
export function showCode(title, text, language) {
  const dialog = element(
    "dialog",
    { class: "dialog wide", "aria-labelledby": "code-title" },
    element(
      "div",
      { class: "panel-head" },
      element("h2", { id: "code-title", text: title }),
      iconButton("close", t("close"), () => dialog.close()),
    ),
    codeBlock(text, language),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
