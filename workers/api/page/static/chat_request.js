// A chat as the body of a request: pure, but for the reading of its media.

import { library } from "./library.js";

/** @typedef {import("./store.js").Chat} Chat */
/** @typedef {import("./store.js").Turn} Turn */

// Settings that are fields of the request by the same name, with numbers as values.
export const NUMBERS = {
  temperature: { min: 0, max: 2, step: 0.1 },
  top_p: { min: 0, max: 1, step: 0.05 },
  max_tokens: { min: 1, step: 1 },
  seed: { step: 1 },
};
export const MORE_NUMBERS = {
  top_k: { step: 1 },
  min_p: { min: 0, max: 1, step: 0.05 },
  presence_penalty: { min: -2, max: 2, step: 0.1 },
  frequency_penalty: { min: -2, max: 2, step: 0.1 },
  repetition_penalty: { min: 0.1, step: 0.05 },
  min_tokens: { min: 0, step: 1 },
  thinking_token_budget: { min: 0, step: 1 },
};
// Of videos: each stands beside the URL.
export const VIDEO_NUMBERS = { fps: { min: 0.1, step: 0.5 }, max_frames: { min: 1, step: 1 } };
export const TOOL_CHOICES = ["auto", "required", "none"];

/**
 * @param {Chat} chat
 * @param {Turn[]} turns those before the answer
 * @param {(media: import("./store.js").Media) => Promise<string>} urlOf
 * @returns {Promise<Object<string, any>>} Throws a SyntaxError for a setting that is no JSON.
 */
export async function requestBody(chat, turns, urlOf = dataUrl) {
  const { settings } = chat;
  const messages = [];
  if (settings.system) messages.push({ role: "system", content: settings.system });
  for (const turn of turns) {
    const message = await toMessage(turn, settings, urlOf);
    if (message) messages.push(message);
  }
  /** @type {Object<string, any>} */
  const body = { messages };
  for (const name of [...Object.keys(NUMBERS), ...Object.keys(MORE_NUMBERS)]) {
    if (typeof settings[name] === "number") body[name] = settings[name];
  }
  const stops = String(settings.stop ?? "").split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  if (settings.thinking) body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  if (settings.schema?.trim()) {
    const schema = JSON.parse(settings.schema);
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  if (settings.tools?.trim()) {
    const tools = JSON.parse(settings.tools);
    body.tools = Array.isArray(tools) ? tools : [tools];
    if (settings.tool_choice && settings.tool_choice !== "auto") body.tool_choice = settings.tool_choice;
  }
  return body;
}

/**
 * @param {Turn} turn
 * @param {Object<string, any>} settings
 * @param {(media: import("./store.js").Media) => Promise<string>} urlOf
 * @returns {Promise<Object<string, any>|null>} null: the model has nothing of this turn
 */
async function toMessage(turn, settings, urlOf) {
  if (turn.role === "tool") return { role: "tool", tool_call_id: turn.callId, content: turn.text };
  if (turn.role === "assistant") {
    if (!turn.text && !turn.calls?.length) return null; // it failed before its first token
    /** @type {Object<string, any>} */
    const message = { role: "assistant", content: turn.text };
    if (turn.thoughts) message.reasoning_content = turn.thoughts;
    if (turn.calls?.length) message.tool_calls = turn.calls.map(callObject);
    return message;
  }
  if (!turn.media.length) return { role: "user", content: turn.text };
  const content = [];
  for (const media of turn.media) content.push(part(media, await urlOf(media), settings));
  if (turn.text) content.push({ type: "text", text: turn.text });
  return { role: "user", content };
}

/** @param {import("./store.js").Call} call */
function callObject(call) {
  return { id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } };
}

/** @param {import("./store.js").Media} media @param {string} url @param {Object<string, any>} settings */
function part(media, url, settings) {
  if (media.kind === "image") return { type: "image_url", image_url: { url } };
  /** @type {Object<string, any>} */
  const video = { type: "video_url", video_url: { url } };
  for (const name of Object.keys(VIDEO_NUMBERS)) {
    if (typeof settings[name] === "number") video[name] = settings[name];
  }
  return video;
}

/** @param {import("./store.js").Media} media @returns {Promise<string>} */
export async function dataUrl(media) {
  const blob = await library.blob(media);
  if (!blob) throw new Error(`${media.name}: ${media.id}`);
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(typed(String(reader.result), media));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Browsers know no type for some files: the server looks at the content. @param {string} url
 * @param {import("./store.js").Media} media */
function typed(url, media) {
  const data = url.slice(url.indexOf(",") + 1);
  const type = /^[\w.+-]+\/[\w.+-]+$/.test(media.type) ? media.type : `${media.kind}/${media.kind === "image" ? "png" : "mp4"}`;
  return `data:${type};base64,${data}`;
}
