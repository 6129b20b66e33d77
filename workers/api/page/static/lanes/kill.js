// Has a worker killed, after the user has said so, and has given the admin key where the server asks for one.

import { element } from "../dom.js";

let adminKey = ""; // for as long as the page is open; it is stored nowhere

/**
 * @param {string} worker
 * @param {boolean} needsKey whether the page's own key does not suffice
 * @param {any} context of the shell
 * @returns {Promise<boolean>} whether it was killed; false if the user has left. Throws an error in words
 */
export async function killWorker(worker, needsKey, context) {
  const key = await ask(worker, needsKey, context.t);
  if (key === null) return false;
  const init = { method: "POST", body: JSON.stringify({ worker }) };
  const headers = { "Content-Type": "application/json" };
  if (!needsKey) {
    await context.request("/admin/kill", { ...init, headers });
    return true;
  }
  const response = await fetch("/admin/kill", { ...init, headers: { ...headers, Authorization: `Bearer ${key}` } });
  if (response.ok) {
    adminKey = key;
    return true;
  }
  adminKey = "";
  throw new Error(await wordsOf(response, context.t));
}

/** @param {Response} response @param {any} t */
async function wordsOf(response, t) {
  try {
    return String((await response.json()).error.message);
  } catch {
    return t("lanes.kill.failed", { status: response.status });
  }
}

/** @param {string} worker @param {boolean} needsKey @param {any} t @returns {Promise<string|null>} null: no */
function ask(worker, needsKey, t) {
  const field = element("input", {
    id: "lanes-admin-key", type: "password", autocomplete: "off", required: true, spellcheck: "false",
  });
  field.value = adminKey;
  const form = element(
    "form",
    { method: "dialog" },
    element("h2", { id: "lanes-kill-title", text: t("lanes.kill.title", { worker }) }),
    element("p", { text: t(worker.startsWith("api.") ? "lanes.kill.api" : "lanes.kill.note") }),
    needsKey && element("label", { for: "lanes-admin-key", text: t("lanes.kill.key") }),
    needsKey && field,
    element(
      "div",
      { class: "dialog-buttons" },
      element("button", { type: "button", class: "button", text: t("cancel"), on: { click: () => dialog.close("") } }),
      element("button", { type: "submit", value: "ok", class: "button primary", text: t("lanes.kill.do") }),
    ),
  );
  const dialog = element("dialog", { class: "dialog", "aria-labelledby": "lanes-kill-title" }, form);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "ok" ? field.value.trim() : null);
      dialog.remove();
    });
  });
}
