// Sends four streams, and after some seconds twenty pictures beside them.
//
// A browser opens six connections to a server. So the four streams are four prompts of one request, three pictures
// are under way at a time, and one connection is left for whatever else the page asks.

import { serverSentEvents } from "../sse.js";
import { newPicture } from "./pictures.js";

export const NUM_STREAMS = 4;
export const NUM_PICTURES = 20;
const PICTURES_AT_ONCE = 3;
const ALONE_MS = 5_000; // the streams run alone before the pictures come
const AFTER_MS = 4_000; // and after them
const LONGEST_MS = 180_000;
const MOST_TOKENS = 8_000; // of a stream
const PROMPT_ROOM = 128; // tokens of a context that the prompt may take
const PICTURE_TOKENS = 24;
const TOPICS = ["the sea", "the night sky", "a long train ride", "an old clock"];

/** @typedef {{state: "warming"|"pictures"|"after"|"done"|"stopped", done: number, seconds: number}} Progress */

export class Demo {
  /**
   * @param {(path: string, init?: RequestInit) => Promise<Response>} request
   * @param {{onToken: (stream: number, phase: "alone"|"pictures") => void, onProgress: (progress: Progress) => void}}
   *   listeners
   * @param {string} question about each picture
   */
  constructor(request, listeners, question) {
    this.request = request;
    this.listeners = listeners;
    this.question = question;
    this.id = ""; // of the request with the streams
    this.isRunning = false;
    this.done = 0;
    this.phase = /** @type {"alone"|"pictures"} */ ("alone");
    this.ending = new AbortController();
  }

  /** @param {string} id of a request of the pipeline @returns {number} which stream it is; -1: none */
  streamOf(id) {
    if (!this.id || !id.startsWith(`${this.id}-`)) return -1;
    const number = Number(id.slice(this.id.length + 1));
    return Number.isInteger(number) && number < NUM_STREAMS ? number : -1;
  }

  stop() {
    if (!this.isRunning) return;
    this.#end("stopped");
  }

  /** @param {"done"|"stopped"} state */
  #end(state) {
    this.isRunning = false;
    this.ending.abort();
    this.#tell(state);
  }

  /** @param {Progress["state"]} state @param {number} [seconds] */
  #tell(state, seconds = 0) {
    this.listeners.onProgress({ state, done: this.done, seconds });
  }

  /** Ends when all has been answered, or `stop` was called. Throws what a request throws. */
  async run() {
    this.isRunning = true;
    const latest = setTimeout(() => this.stop(), LONGEST_MS);
    try {
      const models = await (await this.request("/v1/models", { signal: this.ending.signal })).json();
      const model = models.data[0];
      const streams = this.#stream(model);
      const rest = this.#pictures(model.id);
      await Promise.race([rest, streams.then(() => rest)]);
      if (this.isRunning) this.#end("done");
      await streams;
    } catch (error) {
      const wasRunning = this.isRunning;
      if (wasRunning) this.#end("stopped");
      if (wasRunning) throw error;
    } finally {
      clearTimeout(latest);
    }
  }

  /** @param {any} model */
  async #stream(model) {
    const body = {
      model: model.id,
      prompt: TOPICS.map((topic) => `Once upon a time there was a story about ${topic}.`),
      max_tokens: Math.max(16, Math.min(MOST_TOKENS, model.max_model_len - PROMPT_ROOM)),
      ignore_eos: true,
      temperature: 1,
      stream: true,
    };
    const response = await this.#post("/v1/completions", body);
    if (!response.body) return;
    for await (const data of serverSentEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(String(chunk.error.message));
      this.id ||= String(chunk.id);
      for (const choice of chunk.choices) this.listeners.onToken(choice.index, this.phase);
    }
  }

  /** @param {string} model */
  async #pictures(model) {
    for (let left = ALONE_MS; left > 0; left -= 1000) {
      this.#tell("warming", Math.ceil(left / 1000));
      await this.#wait(1000);
    }
    this.phase = "pictures";
    this.#tell("pictures");
    let next = 0;
    const work = async () => {
      while (next < NUM_PICTURES && this.isRunning) {
        next += 1;
        await this.#ask(model);
        this.done += 1;
        this.#tell("pictures");
      }
    };
    await Promise.all(Array.from({ length: PICTURES_AT_ONCE }, work));
    this.phase = "alone";
    this.#tell("after");
    await this.#wait(AFTER_MS);
  }

  /** @param {string} model */
  async #ask(model) {
    const content = [
      { type: "image_url", image_url: { url: newPicture() } },
      { type: "text", text: this.question },
    ];
    const body = { model, messages: [{ role: "user", content }], max_tokens: PICTURE_TOKENS };
    await (await this.#post("/v1/chat/completions", body)).arrayBuffer();
  }

  /** @param {string} path @param {any} body */
  #post(path, body) {
    return this.request(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: this.ending.signal,
    });
  }

  /** @param {number} ms */
  #wait(ms) {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, ms);
      this.ending.signal.addEventListener("abort", () => {
        clearTimeout(timer);
        reject(this.ending.signal.reason);
      });
    });
  }
}
