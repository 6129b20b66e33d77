// Where the user writes: the text, its pictures and videos, and the button that sends or stops.

import { element, icon, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { library } from "./library.js";
import { ACCEPTED, kindOf, mediaView } from "./media.js";

/** @typedef {import("./store.js").Media} Media */

const TALLEST = 240; // pixels
const BODY_SHARE = 0.74; // of the largest body: base64 needs four bytes for three

export class Composer {
  /**
   * @param {{send: (text: string, media: Media[]) => void, stop: () => void, onError: (error: unknown) => void,
   *   maxRequestMib: number}} options
   */
  constructor({ send, stop, onError, maxRequestMib }) {
    this.send = send;
    this.onError = onError;
    this.mostBytes = maxRequestMib * BODY_SHARE * 2 ** 20;
    /** @type {Media[]} */
    this.media = [];
    this.isRunning = false;
    this.isBlocked = false;
    this.row = element("div", { class: "media-row", hidden: true });
    this.field = element("textarea", {
      id: "question", rows: "1", "aria-label": t("composer.label"), placeholder: t("composer.placeholder"),
      on: {
        input: () => this.grow(),
        keydown: (/** @type {KeyboardEvent} */ event) => this.onKey(event),
        paste: (/** @type {ClipboardEvent} */ event) => this.onPaste(event),
      },
    });
    this.files = this.picker("files", { multiple: true });
    this.camera = this.picker("camera", { capture: "environment" });
    this.button = element("button", { type: "submit", class: "send", "aria-label": t("send"), title: t("send") }, icon("send"));
    this.stopButton = element(
      "button",
      { type: "button", class: "send stop", hidden: true, "aria-label": t("stop"), title: t("stop"), on: { click: stop } },
      icon("stop"),
    );
    this.element = element(
      "form",
      {
        class: "composer",
        on: {
          submit: (/** @type {Event} */ event) => {
            event.preventDefault();
            this.submit();
          },
        },
      },
      this.row,
      this.field,
      element(
        "div",
        { class: "composer-buttons" },
        this.files,
        this.camera,
        iconButton("picture", t("attach"), () => this.files.click(), { class: "attach" }),
        iconButton("camera", t("camera"), () => this.camera.click(), { class: "take" }),
        element("span", { class: "hint keys", text: t("composer.keys") }),
        this.button,
        this.stopButton,
      ),
    );
  }

  /** @param {string} name @param {Object<string, any>} attributes */
  picker(name, attributes) {
    const input = element("input", {
      type: "file", class: "visually-hidden", id: `pick-${name}`, accept: ACCEPTED, tabindex: "-1", "aria-hidden": "true",
      "aria-label": t("attach"), ...attributes,
      on: {
        change: () => {
          this.addFiles([...input.files]);
          input.value = "";
        },
      },
    });
    return input;
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.submit();
  }

  /** @param {ClipboardEvent} event */
  onPaste(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    this.addFiles(files);
  }

  /** @param {File[]} files */
  async addFiles(files) {
    for (const file of files) {
      const kind = kindOf(file);
      const bytes = this.media.reduce((sum, media) => sum + media.size, file.size);
      if (!kind) this.onError(new Error(t("media.other", { name: file.name })));
      else if (bytes > this.mostBytes) {
        this.onError(new Error(t("media.large", { mib: Math.floor(this.mostBytes / 2 ** 20) })));
      } else this.addMedia(await library.keep(file, kind));
    }
    this.field.focus();
  }

  /** @param {Media} media */
  addMedia(media) {
    this.media.push(media);
    const remove = iconButton("close", t("media.remove", { name: media.name }), () => {
      this.media = this.media.filter((other) => other !== media);
      place.remove();
      this.row.hidden = !this.media.length;
      library.drop([media]);
      this.field.focus();
    });
    const place = element("div", { class: "media-place" }, mediaView(media), remove);
    this.row.append(place);
    this.row.hidden = false;
  }

  get draft() {
    return { text: this.field.value, media: this.media };
  }

  /** @param {{text: string, media: Media[]}} draft */
  restore(draft) {
    this.field.value = draft.text;
    for (const media of draft.media) this.addMedia(media);
    this.grow();
  }

  submit() {
    const text = this.field.value.trim();
    if (this.isRunning || this.isBlocked || (!text && !this.media.length)) return;
    const media = this.media;
    this.media = [];
    this.row.replaceChildren();
    this.row.hidden = true;
    this.field.value = "";
    this.grow();
    this.send(text, media);
  }

  grow() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(TALLEST, this.field.scrollHeight)}px`;
  }

  /** @param {boolean} isRunning whether an answer is being written */
  setRunning(isRunning) {
    const hadFocus = document.activeElement === this.stopButton || document.activeElement === this.button;
    this.isRunning = isRunning;
    this.button.hidden = isRunning;
    this.stopButton.hidden = !isRunning;
    if (hadFocus) this.field.focus();
  }
}
