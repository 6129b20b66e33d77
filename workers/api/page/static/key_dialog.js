// Asks the user for an API key. Only one dialog is open, however many requests wait for a key.

import { element } from "./dom.js";
import { t } from "./i18n.js";
import { key } from "./settings.js";

/** @type {Promise<boolean>|null} */
let open = null;

/**
 * @param {{isWrong: boolean}} why whether the server has refused the key that it got
 * @returns {Promise<boolean>} whether there is a new key
 */
export function askForKey(why) {
  open ??= ask(why).finally(() => (open = null));
  return open;
}

/** @param {{isWrong: boolean}} why @returns {Promise<boolean>} */
function ask({ isWrong }) {
  const field = element("input", {
    id: "key-field", type: "password", autocomplete: "off", required: true, spellcheck: "false",
    "aria-describedby": "key-note", "aria-invalid": isWrong && "true",
  });
  const remember = element("input", { type: "checkbox", id: "key-remember" });
  remember.checked = key.isRemembered;
  const form = element(
    "form",
    { method: "dialog" },
    element("h2", { id: "key-title", text: t("key.title") }),
    element("p", { id: "key-note", text: isWrong ? t("key.wrong") : t("key.note") }),
    element("label", { for: "key-field", text: t("key.label") }),
    field,
    element("label", { class: "check" }, remember, t("key.remember")),
    element(
      "div",
      { class: "dialog-buttons" },
      element("button", {
        type: "button", text: t("cancel"), class: "button", on: { click: () => dialog.close("") },
      }),
      element("button", { type: "submit", value: "ok", text: t("key.use"), class: "button primary" }),
    ),
  );
  const dialog = element("dialog", { class: "dialog", "aria-labelledby": "key-title" }, form);
  document.body.append(dialog);
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = field.value.trim();
      const isGiven = dialog.returnValue === "ok" && given !== "";
      if (isGiven) key.set(given, remember.checked);
      dialog.remove();
      resolve(isGiven);
    });
  });
}
