// The API as the page calls it: requests with the key, errors in the server's words, and streams of a chat.

import { t } from "./i18n.js";
import { key } from "./settings.js";
import { serverSentEvents } from "./sse.js";

/** An answer that is not ok. `message` is the server's own sentence. */
export class ApiError extends Error {
  /** @param {string} message @param {number} status @param {string} field that is at fault, if one is */
  constructor(message, status, field = "") {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.field = field;
  }
}

/** @type {(why: {isWrong: boolean}) => Promise<boolean>} */
let askForKey = async () => false;

/** @param {(why: {isWrong: boolean}) => Promise<boolean>} asker */
export function setKeyAsker(asker) {
  askForKey = asker;
}

/**
 * `fetch` with the key. Throws an ApiError for an answer that is not ok.
 * @param {string} path
 * @param {RequestInit} [init]
 * @returns {Promise<Response>}
 */
export async function request(path, init = {}) {
  for (;;) {
    const sent = key.value;
    const headers = new Headers(init.headers);
    if (sent) headers.set("Authorization", `Bearer ${sent}`);
    let response;
    try {
      response = await fetch(path, { ...init, headers });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new ApiError(t("error.unreachable"), 0);
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    // Another request may have got a new key from the user meanwhile.
    if (sent === key.value && !(await askForKey({ isWrong: sent !== "" }))) throw error;
  }
}

/** @param {Response} response @returns {Promise<ApiError>} */
async function errorOf(response) {
  try {
    return errorFrom(await response.json(), response.status);
  } catch {
    return new ApiError(t("error.status", { status: response.status }), response.status);
  }
}

/** @param {any} body @param {number} status */
function errorFrom(body, status) {
  const { message, param } = body.error;
  return new ApiError(String(message), status, param ? String(param) : "");
}

/**
 * The chunks of a streamed chat completion. Throws an ApiError, also for an error within the stream.
 * @param {Object<string, any>} body without `stream`
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>}
 */
export async function* streamChat(body, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(streamed),
    signal,
  });
  if (!response.body) return;
  let isWhole = false;
  try {
    for await (const data of serverSentEvents(response.body)) {
      isWhole ||= data === "[DONE]";
      if (isWhole) continue; // to the stream's end, so that the connection can be used again
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorFrom(chunk, response.status);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError(t("error.broken"), 0);
  }
  if (!isWhole) throw new ApiError(t("error.broken"), 0);
}
