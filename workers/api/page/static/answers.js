// The answers that are being written. They go on while other chats or views are shown.

import { ApiError, streamChat } from "./api.js";
import { requestBody } from "./chat_request.js";
import { library, newId } from "./library.js";
import { t } from "./i18n.js";

/** @typedef {import("./store.js").Chat} Chat */
/** @typedef {import("./store.js").Turn} Turn */

const LEAST_TIMED = 8; // tokens: the rate of a shorter answer says nothing

/** @type {Map<string, {controller: AbortController, turn: Turn}>} by chat */
const running = new Map();
/** @type {Set<(chat: Chat, turn: Turn, isOver: boolean) => void>} */
const listeners = new Set();

export const answers = {
  /** @param {Chat} chat */
  isRunning(chat) {
    return running.has(chat.id);
  },

  /** @param {Chat} chat @returns {boolean} whether an answer was being written */
  stop(chat) {
    const found = running.get(chat.id);
    running.delete(chat.id);
    found?.controller.abort();
    return Boolean(found);
  },

  /** @param {(chat: Chat, turn: Turn, isOver: boolean) => void} listener @returns {() => void} ends it */
  listen(listener) {
    listeners.add(listener);
    return () => listeners.delete(listener);
  },

  /** Asks the model to go on after the chat's turns. @param {Chat} chat @returns {Promise<Turn>} the whole answer */
  async ask(chat) {
    const turns = [...chat.turns];
    /** @type {Turn} */
    const turn = { id: newId(), role: "assistant", text: "", media: [] };
    const controller = new AbortController();
    running.set(chat.id, { controller, turn });
    chat.turns.push(turn);
    library.touch(chat);
    tell(chat, turn, false);
    library.save(chat);
    try {
      await write(chat, turns, turn, controller.signal);
    } catch (error) {
      if (controller.signal.aborted) turn.finish = "stopped";
      else turn.error = inWords(error);
    } finally {
      if (running.get(chat.id)?.turn === turn) running.delete(chat.id);
    }
    if (library.find(chat.id)) await library.save(chat);
    tell(chat, turn, true);
    return turn;
  },
};

/** @param {Chat} chat @param {Turn} turn @param {boolean} isOver */
function tell(chat, turn, isOver) {
  for (const listener of [...listeners]) listener(chat, turn, isOver);
}

/** @param {unknown} error */
function inWords(error) {
  if (error instanceof ApiError) return error.message;
  if (error instanceof SyntaxError) return `${t("error.json")} ${error.message}`;
  return error instanceof Error ? error.message : String(error);
}

/** @param {Chat} chat @param {Turn[]} turns @param {Turn} turn @param {AbortSignal} signal */
async function write(chat, turns, turn, signal) {
  const body = await requestBody(chat, turns);
  const sent = performance.now();
  let first = 0;
  let last = 0;
  /** @type {any} */
  let usage = null;
  try {
    for await (const chunk of streamChat(body, signal)) {
      if (chunk.usage) usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      if (hasTokens(choice.delta)) {
        last = performance.now();
        first ||= last;
        add(turn, choice.delta);
      }
      if (choice.finish_reason) turn.finish = choice.finish_reason;
      library.saveSoon(chat);
      tell(chat, turn, false);
    }
  } finally {
    if (first) turn.figures = figures(first - sent, last - first, usage);
  }
}

/** @param {any} delta */
function hasTokens(delta) {
  return Boolean(delta?.content || delta?.reasoning_content || delta?.reasoning || delta?.tool_calls?.length);
}

/** @param {Turn} turn @param {any} delta */
function add(turn, delta) {
  if (delta.content) turn.text += delta.content;
  const thought = delta.reasoning_content || delta.reasoning;
  if (thought) turn.thoughts = (turn.thoughts ?? "") + thought;
  for (const part of delta.tool_calls ?? []) {
    const calls = (turn.calls ??= []);
    const call = (calls[part.index ?? calls.length] ??= { id: "", name: "", arguments: "" });
    call.id ||= part.id ?? "";
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
}

/** @param {number} ttftMs @param {number} writingMs @param {any} usage @returns {import("./store.js").Figures} */
function figures(ttftMs, writingMs, usage) {
  const output = usage?.completion_tokens ?? 0;
  return {
    ttft: ttftMs / 1000,
    // The first token came with the TTFT: the others took the rest of the time.
    rate: output >= LEAST_TIMED && writingMs > 0 ? ((output - 1) * 1000) / writingMs : null,
    prompt: usage?.prompt_tokens ?? 0,
    output,
    thoughts: usage?.completion_tokens_details?.reasoning_tokens ?? 0,
    cached: usage?.prompt_tokens_details?.cached_tokens ?? 0,
    media: usage?.prompt_tokens_details?.media_tokens ?? null,
  };
}
