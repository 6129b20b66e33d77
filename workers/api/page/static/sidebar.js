// The list of chats: choose, begin, rename, export, delete.

import { confirmDialog, textDialog } from "./dialogs.js";
import { element, icon, iconButton } from "./dom.js";
import { exportChat } from "./export.js";
import { t } from "./i18n.js";
import { library } from "./library.js";

/** @typedef {import("./store.js").Chat} Chat */

export class Sidebar {
  /** @param {{open: (chat: Chat) => void, begin: () => void, removed: (chat: Chat) => void, close: () => void}} options */
  constructor(options) {
    this.options = options;
    this.list = element("ul", { class: "chats" });
    this.element = element(
      "nav",
      { class: "sidebar", id: "sidebar", "aria-label": t("chats") },
      element(
        "div",
        { class: "sidebar-head" },
        element("button", { type: "button", class: "button new-chat", on: { click: options.begin } }, icon("plus"), t("chat.new")),
        iconButton("close", t("close"), options.close, { class: "close-sidebar" }),
      ),
      this.list,
      element("p", { class: "hint", text: t("chats.note") }),
    );
  }

  /** @param {Chat} shown */
  draw(shown) {
    this.list.replaceChildren(...library.chats.map((chat) => this.entry(chat, chat === shown)));
  }

  /** @param {Chat} chat @param {boolean} isShown */
  entry(chat, isShown) {
    const title = chat.title || t("chat.untitled");
    const open = element("button", {
      type: "button", class: "chat-name", text: title, title, "aria-current": isShown && "true",
      on: { click: () => this.options.open(chat) },
    });
    return element(
      "li",
      { class: isShown ? "shown" : "" },
      open,
      element(
        "span",
        { class: "chat-buttons" },
        iconButton("edit", t("chat.rename", { title }), () => this.rename(chat)),
        iconButton("download", t("chat.export", { title }), () => exportChat(chat)),
        iconButton("trash", t("chat.delete", { title }), () => this.remove(chat)),
      ),
    );
  }

  /** @param {Chat} chat */
  async rename(chat) {
    const title = await textDialog(t("chat.rename.title"), t("chat.rename.label"), chat.title);
    if (!title) return;
    chat.title = title;
    chat.isNamed = true;
    await library.save(chat);
    this.options.open(chat);
  }

  /** @param {Chat} chat */
  async remove(chat) {
    const title = chat.title || t("chat.untitled");
    if (!(await confirmDialog(t("chat.delete.title"), t("chat.delete.note", { title }), t("delete")))) return;
    this.options.removed(chat);
  }
}
