// What the lanes show: the pieces of work of the last seconds, and what became of each worker. No drawing here.

export const WINDOW_MS = 30_000;
const KEPT_MS = WINDOW_MS + 3_000; // behind the left edge a piece of work is of no use
const MAX_ROWS = 4; // of pieces of work at the same time in one lane
const HIDDEN = new Set(["prepare"]); // it only encloses others

/**
 * @typedef {object} Work
 * @property {string} name
 * @property {{offset: number}} clock
 * @property {number} start milliseconds of the server's clock; with `clock.offset` of the page's
 * @property {number} duration ms; infinite while it goes on
 * @property {number[]} requests their keys; 0: requests that are not shown to this page
 * @property {number} amount
 * @property {number} steps
 * @property {number} row
 */
/**
 * @typedef {object} Lane
 * @property {string} worker
 * @property {number} epoch
 * @property {boolean} isReady
 * @property {string|undefined} lead whose steps it computes
 * @property {Work[]} work
 * @property {{at: number, until: number|null, epoch: number}[]} gaps while it was dead or started, in the page's time
 */

export class LanesModel {
  constructor() {
    /** @type {Lane[]} */
    this.lanes = [];
    /** @type {Map<number, {id: string, isMine: boolean}>} */
    this.requests = new Map();
    this.sees = "all";
    this.kill = "off";
    this.numDropped = 0;
    this.changedAt = 0; // the page's time of the last piece of work
    this.#keyBase = 0;
  }

  #keyBase; // the server numbers requests anew for each connection
  #nextKey = 1;

  /** A new connection begins. */
  begin() {
    this.#keyBase = this.#nextKey;
    // Nobody will tell the end of what went on when the last one broke.
    for (const lane of this.lanes) lane.work = lane.work.filter((work) => work.duration < Infinity);
  }

  /** @param {any} event of the server @param {{offset: number}} clock @param {number} now of the page */
  take(event, clock, now) {
    if (event.lanes) this.#takeLanes(event, now);
    if (event.work) this.#takeWork(event, clock, now);
  }

  /** @param {any} event @param {number} now */
  #takeLanes(event, now) {
    this.sees = event.sees;
    this.kill = event.kill;
    const before = new Map(this.lanes.map((lane) => [lane.worker, lane]));
    this.lanes = event.lanes.map((/** @type {any} */ told) => {
      const lane = before.get(told.worker) ?? newLane(told);
      const gap = lane.gaps.at(-1);
      const isGone = told.epoch !== lane.epoch || (!told.is_ready && lane.isReady);
      if (isGone) lane.work = lane.work.filter((work) => work.duration < Infinity); // it died with the worker
      if (isGone && (!gap || gap.until !== null)) lane.gaps.push({ at: now, until: null, epoch: told.epoch });
      else if (gap && gap.until === null) gap.epoch = told.epoch;
      const open = lane.gaps.at(-1);
      if (told.is_ready && open && open.until === null) open.until = now;
      lane.epoch = told.epoch;
      lane.isReady = told.is_ready;
      return lane;
    });
    this.changedAt = now;
  }

  /** @param {any} event @param {{offset: number}} clock @param {number} now */
  #takeWork(event, clock, now) {
    for (const [number, request] of Object.entries(event.requests ?? {})) {
      const key = this.#keyBase + Number(number);
      this.#nextKey = Math.max(this.#nextKey, key + 1);
      this.requests.set(key, { id: request.id, isMine: request.is_mine });
    }
    this.numDropped = event.dropped ?? this.numDropped;
    for (const lane of this.lanes) {
      for (const row of event.work[lane.worker] ?? []) this.#add(lane, row, clock);
      const oldest = now - KEPT_MS;
      const kept = lane.work.findIndex((work) => work.start + work.clock.offset + work.duration >= oldest);
      lane.work.splice(0, kept < 0 ? lane.work.length : kept);
      lane.gaps = lane.gaps.filter((gap) => gap.until === null || gap.until >= oldest);
    }
    this.#forgetRequests();
    this.changedAt = now;
  }

  /** @param {Lane} lane @param {any[]} row @param {{offset: number}} clock */
  #add(lane, [name, start, duration, numbers, amount, steps], clock) {
    if (HIDDEN.has(name)) return;
    const going = lane.work.findLastIndex((other) => other.name === name && other.duration === Infinity);
    if (going >= 0) lane.work.splice(going, 1); // what has come now tells it whole
    const requests = numbers.map((/** @type {number} */ number) => (number === 0 ? 0 : this.#keyBase + number));
    duration ??= Infinity;
    const work = { name, clock, start, duration, requests, amount, steps, row: 0 };
    const taken = new Set(
      lane.work
        .slice(-64)
        .filter((other) => other.clock === clock && other.start < start + duration && other.start + other.duration > start)
        .map((other) => other.row),
    );
    while (taken.has(work.row) && work.row < MAX_ROWS - 1) work.row += 1;
    lane.work.push(work);
  }

  #forgetRequests() {
    if (this.requests.size < 2048) return;
    const used = new Set(this.lanes.flatMap((lane) => lane.work.flatMap((work) => work.requests)));
    for (const key of this.requests.keys()) if (!used.has(key)) this.requests.delete(key);
  }

  /** @param {number} now @returns {boolean} whether anything lies in the window */
  hasWork(now) {
    const isShown = (/** @type {Work} */ work) => work.start + work.clock.offset + work.duration > now - WINDOW_MS;
    return this.lanes.some((lane) => lane.gaps.length > 0 || lane.work.some(isShown));
  }

  /**
   * What each lane has done within the window.
   * @param {number} now
   * @returns {{lane: Lane, counts: Map<string, number>, busy: number}[]} `busy`: from 0 to 1
   */
  summary(now) {
    return this.lanes.map((lane) => {
      /** @type {Map<string, number>} */
      const counts = new Map();
      let busy = 0;
      let covered = now - WINDOW_MS; // pieces of work at the same time count once
      const inOrder = this.workOf(lane).toSorted((one, other) => one.start - other.start);
      for (const work of inOrder) {
        const start = work.start + work.clock.offset;
        const end = Math.min(now, start + work.duration);
        if (end < now - WINDOW_MS) continue;
        counts.set(work.name, (counts.get(work.name) ?? 0) + work.steps);
        busy += Math.max(0, end - Math.max(start, covered));
        covered = Math.max(covered, end);
      }
      return { lane, counts, busy: Math.min(1, busy / WINDOW_MS) };
    });
  }

  /** @param {Lane} lane @returns {Work[]} a rank that is no lead computes the steps of its lead */
  workOf(lane) {
    return (lane.lead && this.lanes.find((other) => other.worker === lane.lead)?.work) || lane.work;
  }
}

/** @param {any} told @returns {Lane} */
function newLane(told) {
  return { worker: told.worker, epoch: told.epoch, isReady: told.is_ready, lead: told.lead, work: [], gaps: [] };
}
