// Reads the server's events while the page is seen. A hidden tab takes nothing; a lost connection is tried again.

import { serverSentEvents } from "../sse.js";

const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5_000;

/** @typedef {"connecting"|"open"|"lost"} FeedState */

export class LanesFeed {
  /**
   * @param {(path: string, init: RequestInit) => Promise<Response>} request
   * @param {import("./model.js").LanesModel} model
   * @param {{onState: (state: FeedState) => void, onEvent: () => void, onError: (error: any) => void}} listeners
   */
  constructor(request, model, listeners) {
    this.request = request;
    this.model = model;
    this.listeners = listeners;
    this.isEnded = false;
    /** @type {AbortController|null} */
    this.open = null;
    /** @type {any} */
    this.timer = null;
    this.retryMs = FIRST_RETRY_MS;
    this.onVisibility = () => (document.hidden ? this.#leave() : this.#connect());
    document.addEventListener("visibilitychange", this.onVisibility);
    this.#connect();
  }

  end() {
    this.isEnded = true;
    document.removeEventListener("visibilitychange", this.onVisibility);
    this.#leave();
  }

  #leave() {
    clearTimeout(this.timer);
    this.open?.abort();
    this.open = null;
  }

  async #connect() {
    if (this.isEnded || this.open || document.hidden) return;
    const mine = new AbortController();
    this.open = mine;
    this.listeners.onState("connecting");
    try {
      const response = await this.request("/lanes/events", { signal: mine.signal });
      if (response.body) await this.#read(response.body, mine);
    } catch (error) {
      // Only an answer that is no stream says something new; a connection that broke is tried again.
      const status = /** @type {any} */ (error).status;
      if (!mine.signal.aborted && status) this.listeners.onError(error);
      if (status === 401 || status === 403) this.isEnded = true;
    }
    if (this.open !== mine) return;
    this.open = null;
    this.listeners.onState("lost");
    if (this.isEnded) return;
    this.timer = setTimeout(() => this.#connect(), this.retryMs);
    this.retryMs = Math.min(LAST_RETRY_MS, this.retryMs * 2);
  }

  /** @param {ReadableStream<Uint8Array>} stream @param {AbortController} mine */
  async #read(stream, mine) {
    const clock = { offset: Infinity };
    this.model.begin();
    for await (const data of serverSentEvents(stream)) {
      if (mine.signal.aborted) return;
      const now = performance.now();
      const event = JSON.parse(data);
      if (event.error) return; // the server's last words
      // The event that was fastest on its way tells best how far the two clocks are apart.
      clock.offset = Math.min(clock.offset, now - event.at);
      this.retryMs = FIRST_RETRY_MS;
      this.model.take(event, clock, now);
      if (event.lanes) this.listeners.onState("open");
      this.listeners.onEvent();
    }
  }
}
