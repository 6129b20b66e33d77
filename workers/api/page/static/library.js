// All chats of this browser, in memory, and their way to the store. One for the page: views come and go.

import { Store } from "./store.js";
import { choices } from "./settings.js";

/** @typedef {import("./store.js").Chat} Chat */
/** @typedef {import("./store.js").Turn} Turn */
/** @typedef {import("./store.js").Media} Media */

const SAVE_AFTER_MS = 800; // while an answer streams

/** @type {Store} */
let store;
/** @type {Chat[]} */
let chats = [];
/** @type {Promise<void>|null} */
let loading = null;
/** @type {Map<string, number>} timers by chat */
const pending = new Map();
/** @type {Map<string, string>} blob: URLs by the id of the media */
const urls = new Map();
/** @type {(error: unknown) => void} */
let onError = () => {};

export const library = {
  /** @param {(error: unknown) => void} report is told when the browser has no room left */
  async load(report) {
    onError = report;
    loading ??= (async () => {
      store = await Store.open();
      chats = await store.chats();
    })();
    await loading;
  },

  get chats() {
    return chats;
  },

  /** @param {string} id @returns {Chat|undefined} */
  find(id) {
    return chats.find((chat) => chat.id === id);
  },

  /** A chat with the settings that were used last. It is stored with its first turn. @returns {Chat} */
  begin() {
    const now = Date.now();
    const settings = choices.get("settings") ?? {};
    return { id: newId(), title: "", isNamed: false, created: now, updated: now, turns: [], settings };
  },

  /** @param {Chat} chat */
  async save(chat) {
    clearTimeout(pending.get(chat.id));
    pending.delete(chat.id);
    if (!chats.includes(chat)) chats.unshift(chat);
    await guarded(() => store.save(chat));
  },

  /** Saves once for many changes. @param {Chat} chat */
  saveSoon(chat) {
    if (pending.has(chat.id)) return;
    pending.set(chat.id, window.setTimeout(() => this.save(chat), SAVE_AFTER_MS));
  },

  /** Puts a chat first, as the one that was used last. @param {Chat} chat */
  touch(chat) {
    chat.updated = Date.now();
    chats = [chat, ...chats.filter((other) => other !== chat)];
  },

  /** @param {Chat} chat */
  async remove(chat) {
    clearTimeout(pending.get(chat.id));
    pending.delete(chat.id);
    chats = chats.filter((other) => other !== chat);
    await guarded(() => store.remove(chat));
  },

  /** @param {Chat} chat @param {number} index of the first turn to drop */
  async cut(chat, index) {
    const dropped = chat.turns.splice(index);
    const kept = new Set(chat.turns.flatMap((turn) => turn.media.map((media) => media.id)));
    const gone = dropped.flatMap((turn) => turn.media).filter((media) => !kept.has(media.id));
    await guarded(() => store.removeMedia(gone));
  },

  /** @param {File} file @param {"image"|"video"} kind @returns {Promise<Media>} */
  async keep(file, kind) {
    const media = { id: newId(), kind, name: file.name, type: file.type, size: file.size };
    await guarded(() => store.saveMedia(media, file));
    return media;
  },

  /** @param {Media[]} media */
  async drop(media) {
    await guarded(() => store.removeMedia(media));
  },

  /** @param {Media} media */
  blob(media) {
    return store.blob(media);
  },

  /** @param {Media} media @returns {Promise<string>} a blob: URL; empty if the browser has dropped the content */
  async url(media) {
    let url = urls.get(media.id);
    if (!url) {
      const blob = await store.blob(media);
      if (!blob) return "";
      url = URL.createObjectURL(blob);
      urls.set(media.id, url);
    }
    return url;
  },
};

/** @param {() => Promise<void>} action */
async function guarded(action) {
  try {
    await action();
  } catch (error) {
    onError(error);
  }
}

/** `crypto.randomUUID` is not there on plain http. @returns {string} */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
