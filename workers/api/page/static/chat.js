// The view of chats: the list on the left, the turns with the field below, the settings on the right.

import { answers } from "./answers.js";
import { requestBody } from "./chat_request.js";
import { Composer } from "./composer.js";
import { announce, element, iconButton } from "./dom.js";
import { showCode } from "./dialogs.js";
import { library, newId } from "./library.js";
import { kindOf } from "./media.js";
import { messageView } from "./message.js";
import { Panel } from "./panel.js";
import { samplesView } from "./samples.js";
import { Sidebar } from "./sidebar.js";
import { t } from "./i18n.js";

/** @typedef {import("./store.js").Chat} Chat */
/** @typedef {import("./store.js").Turn} Turn */
/** @typedef {import("./store.js").Media} Media */

export const ignoresTheme = true;
const NEAR_END = 80; // pixels: who reads so near to the end follows the text
const LONGEST_TITLE = 60;
/** @type {{text: string, media: Media[]}} what was not sent yet when the view was last left */
let draft = { text: "", media: [] };
const LONGEST_ANNOUNCED = 1000; // characters of an answer that are read out

/**
 * @param {HTMLElement} place
 * @param {any} context of the shell: main.js
 * @returns {Promise<() => void>}
 */
export async function mount(place, context) {
  await library.load(context.onError);
  const view = new ChatView(place, context);
  view.open(library.find(context.rest) ?? library.begin(), document.activeElement === document.body);
  view.composer.restore(draft);
  return () => {
    draft = view.composer.draft;
    view.unmount();
  };
}

class ChatView {
  /** @param {HTMLElement} place @param {any} context */
  constructor(place, context) {
    this.context = context;
    this.onError = context.onError;
    this.isFollowing = true;
    /** @type {Chat} */
    this.chat = library.begin();
    /** @type {Map<Turn, {element: HTMLElement, update: (isOver: boolean) => void}>} */
    this.views = new Map();
    this.sidebar = new Sidebar({
      open: (chat) => this.open(chat),
      begin: () => this.open(library.begin()),
      removed: (chat) => this.remove(chat),
      close: () => this.toggleSidebar(false),
    });
    this.panel = new Panel({ change: () => this.saveSettings(), close: () => this.togglePanel(false) });
    this.composer = new Composer({
      send: (text, media) => this.send(text, media),
      stop: () => answers.stop(this.chat),
      onError: this.onError,
      maxRequestMib: context.setup.max_request_mib,
    });
    this.turns = element("div", { class: "turns" });
    this.thread = element("div", { class: "thread", tabindex: "-1" }, this.turns);
    this.title = element("h1", { class: "chat-title" });
    const menu = iconButton("menu", t("chats"), () => this.toggleSidebar(), { class: "open-sidebar", "aria-expanded": "false", "aria-controls": "sidebar" });
    const settings = iconButton("sliders", t("settings"), () => this.togglePanel(), { class: "open-panel", "aria-expanded": "false", "aria-controls": "panel" });
    this.menu = menu;
    this.settingsButton = settings;
    this.column = element(
      "section",
      { class: "column", "aria-label": t("view.chat") },
      element("div", { class: "column-head" }, menu, this.title, settings),
      this.thread,
      this.composer.element,
    );
    this.drop = element("div", { class: "drop-note", hidden: true, text: t("drop") });
    place.append(this.sidebar.element, this.column, this.panel.element, this.drop);
    this.listen(place);
  }

  /** @param {HTMLElement} place */
  listen(place) {
    this.controller = new AbortController();
    const { signal } = this.controller;
    this.endListening = answers.listen((chat, turn, isOver) => this.onAnswer(chat, turn, isOver));
    this.thread.addEventListener("grown", () => this.follow(), { signal });
    this.thread.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.thread;
      this.isFollowing = scrollHeight - scrollTop - clientHeight < NEAR_END;
    }, { signal });
    document.addEventListener("keydown", (event) => this.onKey(event), { signal });
    addEventListener("hashchange", () => {
      const id = location.hash.split("/")[1] ?? "";
      if (id !== this.chat.id && location.hash.startsWith("#chat")) this.open(library.find(id) ?? library.begin());
    }, { signal });
    place.addEventListener("dragover", (event) => {
      event.preventDefault();
      this.drop.hidden = false;
    }, { signal });
    place.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) this.drop.hidden = true;
    }, { signal });
    place.addEventListener("drop", (event) => {
      event.preventDefault();
      this.drop.hidden = true;
      this.composer.addFiles([...(event.dataTransfer?.files ?? [])]);
    }, { signal });
  }

  unmount() {
    this.endListening?.();
    this.controller?.abort();
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (answers.stop(this.chat)) announce(t("stopped"));
    else if (!this.panel.element.hidden) this.togglePanel(false);
    else this.toggleSidebar(false);
  }

  /** @param {Chat} chat @param {boolean} [takesFocus] */
  open(chat, takesFocus = true) {
    this.chat = chat;
    this.isFollowing = true;
    const address = library.find(chat.id) ? `#chat/${chat.id}` : "#chat";
    if (!location.hash) history.replaceState(null, "", address);
    else if (location.hash !== address) history.pushState(null, "", address);
    this.drawTurns();
    this.panel.show(chat.settings);
    this.drawFrame();
    this.toggleSidebar(false);
    // On a phone the focus would open the keyboard.
    if (takesFocus && !matchMedia("(pointer: coarse)").matches) this.composer.field.focus();
  }

  drawFrame() {
    this.sidebar.draw(this.chat);
    this.title.textContent = this.chat.title || t("chat.new");
    this.composer.setRunning(answers.isRunning(this.chat));
  }

  drawTurns() {
    this.views.clear();
    if (!this.chat.turns.length) {
      this.turns.replaceChildren(this.welcome());
      return;
    }
    this.turns.replaceChildren();
    for (const turn of this.chat.turns) this.addView(turn);
    this.follow();
  }

  welcome() {
    const { samples } = this.context.setup;
    return element(
      "div",
      { class: "welcome" },
      element("h2", { text: t("welcome") }),
      element("p", { text: samples.length ? t("welcome.samples") : t("welcome.note") }),
      samples.length > 0 &&
        samplesView(samples, async (file, question) => this.send(question, [await library.keep(file, kindOf(file) ?? "image")])),
    );
  }

  /** @param {Turn} turn */
  addView(turn) {
    const view = messageView(turn, {
      edit: (edited, text) => this.edit(edited, text),
      regenerate: (answer) => this.regenerate(answer),
      inspect: (answer) => this.inspect(answer),
      answerCalls: (answer, results) => this.answerCalls(answer, results),
    });
    this.views.set(turn, view);
    this.turns.append(view.element);
    view.update(!(answers.isRunning(this.chat) && turn === this.chat.turns.at(-1)));
  }

  follow() {
    if (this.isFollowing) this.thread.scrollTop = this.thread.scrollHeight;
  }

  /** @param {Chat} chat @param {Turn} turn @param {boolean} isOver */
  onAnswer(chat, turn, isOver) {
    if (chat !== this.chat) {
      if (isOver) this.sidebar.draw(this.chat);
      return;
    }
    const view = this.views.get(turn);
    if (!chat.turns.includes(turn)) return; // it was being written when the user went back behind it
    if (!view) {
      this.addView(turn);
      this.follow();
      this.drawFrame();
      announce(t("answering"));
      return;
    }
    view.update(isOver);
    if (isOver) {
      this.drawFrame();
      announce(turn.error || turn.text.slice(0, LONGEST_ANNOUNCED) || t("answered"));
    }
  }

  /** @param {string} text @param {Media[]} media */
  async send(text, media) {
    await this.ask([{ id: newId(), role: "user", text, media }]);
  }

  /** @param {Turn[]} turns */
  async ask(turns) {
    const { chat } = this;
    if (answers.isRunning(chat)) return;
    if (!chat.turns.length) this.turns.replaceChildren();
    chat.turns.push(...turns);
    const named = turns.find((turn) => turn.text);
    if (!chat.isNamed && !chat.title && named) chat.title = named.text.replace(/\s+/g, " ").slice(0, LONGEST_TITLE);
    await library.save(chat);
    if (chat === this.chat) {
      history.replaceState(null, "", `#chat/${chat.id}`);
      for (const turn of turns) this.addView(turn);
      this.isFollowing = true;
    }
    await answers.ask(chat);
  }

  /** @param {Turn} turn @param {string} text */
  async edit(turn, text) {
    await this.goBack(turn);
    await this.ask([{ ...turn, id: newId(), text }]);
  }

  /** @param {Turn} answer */
  async regenerate(answer) {
    await this.goBack(answer);
    await this.ask([]);
  }

  /** Drops a turn and all behind it. @param {Turn} turn */
  async goBack(turn) {
    answers.stop(this.chat);
    const index = this.chat.turns.indexOf(turn);
    const kept = { ...turn, media: [] };
    // The media of an edited turn are asked about again.
    this.chat.turns[index] = kept;
    await library.cut(this.chat, index);
    this.drawTurns();
  }

  /** @param {Turn} answer @param {string[]} results */
  async answerCalls(answer, results) {
    const turns = (answer.calls ?? []).map((call, index) => ({
      id: newId(), role: /** @type {"tool"} */ ("tool"), text: results[index], media: [], callId: call.id, name: call.name,
    }));
    await this.ask(turns);
  }

  /** Shows the request of an answer. @param {Turn} answer */
  async inspect(answer) {
    try {
      const before = this.chat.turns.slice(0, this.chat.turns.indexOf(answer));
      const body = await requestBody(this.chat, before, async (media) => `data:${media.type};base64,…`);
      showCode(t("inspect.title"), `POST /v1/chat/completions\n\n${JSON.stringify(body, null, 2)}`, "json");
    } catch (error) {
      this.onError(error);
    }
  }

  saveSettings() {
    if (library.find(this.chat.id)) library.saveSoon(this.chat);
  }

  /** @param {Chat} chat */
  async remove(chat) {
    answers.stop(chat);
    await library.remove(chat);
    if (chat === this.chat) this.open(library.begin());
    else this.drawFrame();
  }

  /** @param {boolean} [isOpen] */
  toggleSidebar(isOpen) {
    const now = this.sidebar.element.classList.toggle("open", isOpen);
    this.menu.setAttribute("aria-expanded", String(now));
  }

  /** @param {boolean} [isOpen] */
  togglePanel(isOpen = this.panel.element.hidden) {
    this.panel.element.hidden = !isOpen;
    this.settingsButton.setAttribute("aria-expanded", String(isOpen));
    const target = isOpen ? this.panel.element.querySelector("textarea") : this.settingsButton;
    /** @type {HTMLElement} */ (target).focus();
  }
}
