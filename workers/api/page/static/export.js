// A chat as a file: its turns, with pictures and videos as data URLs.

import { dataUrl } from "./chat_request.js";
import { element } from "./dom.js";

/** @param {import("./store.js").Chat} chat */
export async function exportChat(chat) {
  const turns = await Promise.all(
    chat.turns.map(async ({ id: _, media, ...turn }) => ({ ...turn, media: await Promise.all(media.map(withContent)) })),
  );
  const { title, created, updated, settings } = chat;
  const text = JSON.stringify({ title, created, updated, settings, turns }, null, 2);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const name = (title || "chat").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "chat";
  element("a", { href: url, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** @param {import("./store.js").Media} media */
async function withContent({ id, kind, name, type, size }) {
  return { name, kind, url: await dataUrl({ id, kind, name, type, size }) };
}
