// The settings of a chat: what the model is told before it, how tokens are chosen, and the form of answers.

import { MORE_NUMBERS, NUMBERS, TOOL_CHOICES, VIDEO_NUMBERS } from "./chat_request.js";
import { element, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { choices } from "./settings.js";

const EXAMPLE_SCHEMA = `{
  "type": "object",
  "properties": {
    "shape": { "type": "string" },
    "color": { "type": "string" }
  },
  "required": ["shape", "color"]
}`;
const EXAMPLE_TOOLS = `[{
  "type": "function",
  "function": {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
      "type": "object",
      "properties": { "city": { "type": "string" } },
      "required": ["city"]
    }
  }
}]`;

export class Panel {
  /** @param {{change: () => void, close: () => void}} options */
  constructor({ change, close }) {
    this.change = change;
    /** @type {Object<string, any>} */
    this.settings = {};
    this.form = element("form", { on: { submit: (/** @type {Event} */ event) => event.preventDefault() } });
    this.element = element(
      "aside",
      { class: "panel", id: "panel", "aria-label": t("settings"), hidden: true },
      element("div", { class: "panel-head" }, element("h2", { text: t("settings") }), iconButton("close", t("close"), close)),
      this.form,
    );
  }

  /** @param {Object<string, any>} settings of the shown chat, which this changes in place */
  show(settings) {
    this.settings = settings;
    this.form.replaceChildren(
      this.area("system", { rows: "3", placeholder: t("setting.system.placeholder") }),
      element("div", { class: "number-grid" }, ...this.numbers(NUMBERS)),
      this.select("thinking", ["", "on", "off"]),
      this.group("more", element("div", { class: "number-grid" }, ...this.numbers(MORE_NUMBERS)), this.area("stop", { rows: "2" })),
      this.group("video", element("div", { class: "number-grid" }, ...this.numbers(VIDEO_NUMBERS))),
      this.group("schema", this.json("schema", EXAMPLE_SCHEMA)),
      this.group("tools", this.json("tools", EXAMPLE_TOOLS), this.select("tool_choice", TOOL_CHOICES)),
      element("button", { type: "button", class: "button", text: t("settings.reset"), on: { click: () => this.reset() } }),
    );
  }

  reset() {
    for (const name of Object.keys(this.settings)) delete this.settings[name];
    this.keep();
    this.show(this.settings);
  }

  /** @param {string} name @param {any} value empty or null: as the server does without */
  set(name, value) {
    if (value === "" || value === null) delete this.settings[name];
    else this.settings[name] = value;
    this.keep();
  }

  keep() {
    choices.set("settings", { ...this.settings }); // the next new chat begins with them
    this.change();
  }

  /** @param {Object<string, {min?: number, max?: number, step: number}>} numbers */
  numbers(numbers) {
    return Object.entries(numbers).map(([name, limits]) => {
      const field = element("input", {
        type: "number", id: `set-${name}`, inputmode: "decimal", ...limits, step: limits.step === 1 ? 1 : "any",
        placeholder: t("setting.default"),
        on: { input: () => this.set(name, Number.isFinite(field.valueAsNumber) ? field.valueAsNumber : null) },
      });
      field.value = this.settings[name] ?? "";
      return this.labelled(name, field);
    });
  }

  /** @param {string} name @param {HTMLElement} field */
  labelled(name, field) {
    const title = t(`setting.${name}.title`);
    return element(
      "div",
      { class: "setting" },
      element("label", { for: field.id, text: t(`setting.${name}`), title: title.startsWith("setting.") ? null : title }),
      field,
    );
  }

  /** @param {string} name @param {Object<string, any>} attributes */
  area(name, attributes) {
    const field = element("textarea", {
      id: `set-${name}`, spellcheck: "false", ...attributes, on: { input: () => this.set(name, field.value) },
    });
    field.value = this.settings[name] ?? "";
    return this.labelled(name, field);
  }

  /** @param {string} name @param {string[]} options */
  select(name, options) {
    const field = element(
      "select",
      { id: `set-${name}`, on: { change: () => this.set(name, field.value) } },
      ...options.map((value) => element("option", { value, text: t(`setting.${name}.${value || "default"}`) })),
    );
    field.value = this.settings[name] ?? options[0];
    return this.labelled(name, field);
  }

  /** A field for JSON, which says at once when it is none. @param {string} name @param {string} example */
  json(name, example) {
    const labelled = this.area(name, { rows: "8", class: "code-field", placeholder: example, "aria-describedby": `set-${name}-note` });
    const field = /** @type {HTMLTextAreaElement} */ (labelled.querySelector("textarea"));
    const note = element("p", { class: "hint", id: `set-${name}-note`, role: "status" });
    const check = () => {
      let wrong = "";
      try {
        if (field.value.trim()) JSON.parse(field.value);
      } catch (error) {
        wrong = `${t("error.json")} ${error instanceof Error ? error.message : ""}`;
      }
      field.setAttribute("aria-invalid", String(Boolean(wrong)));
      note.textContent = wrong || t(`setting.${name}.note`);
      note.classList.toggle("error", Boolean(wrong));
    };
    field.addEventListener("input", check);
    check();
    const useExample = () => {
      field.value = example;
      this.set(name, example);
      check();
      field.focus();
    };
    labelled.append(note, element("button", { type: "button", class: "button small", text: t("setting.example"), on: { click: useExample } }));
    return labelled;
  }

  /** @param {string} name @param {...Node} children */
  group(name, ...children) {
    const isSet = Boolean(this.settings[name]);
    return element("details", { class: "group", open: isSet }, element("summary", { text: t(`settings.${name}`) }), ...children);
  }
}
