// The lanes in words: a table for who does not see the drawing, and the figures of the streams.

import { element } from "../dom.js";

/** @param {number} value @param {string} language @param {number} digits */
export function number(value, language, digits = 0) {
  return value.toLocaleString(language, { maximumFractionDigits: digits });
}

/**
 * @param {import("./model.js").LanesModel} model
 * @param {number} now
 * @param {any} context of the shell
 */
export function lanesTable(model, now, { t, language }) {
  const rows = model.summary(now).map(({ lane, counts, busy }) => {
    const work = [...counts].map(([name, count]) => `${t(`lanes.work.${name}`)}: ${number(count, language)}`);
    return element(
      "tr",
      {},
      element("th", { scope: "row", text: lane.worker }),
      element("td", { text: t(lane.isReady ? "lanes.ready" : "lanes.starting") }),
      element("td", { text: work.join("; ") || t("lanes.table.nothing") }),
      element("td", { text: `${number(100 * busy, language)} %` }),
    );
  });
  const heads = ["lane", "state", "work", "busy"].map((name) =>
    element("th", { scope: "col", text: t(`lanes.table.${name}`) }),
  );
  return element(
    "table",
    { class: "lanes-table" },
    element("thead", {}, element("tr", {}, ...heads)),
    element("tbody", {}, ...rows),
  );
}

/** @param {import("./latency.js").Latencies} latencies @param {any} context of the shell */
export function latencyTable(latencies, { t, language }) {
  const rows = latencies.rows().map((row) =>
    element(
      "tr",
      { class: `phase-${row.phase}` },
      element("th", { scope: "row", text: t(`lanes.phase.${row.phase}`) }),
      ...[row.p50, row.p99, row.longest].map((ms) => element("td", { text: number(ms, language, 1) })),
      element("td", { text: number(row.count, language) }),
    ),
  );
  const heads = ["phase", "p50", "p99", "longest", "count"].map((name) =>
    element("th", { scope: "col", text: t(`lanes.${name}`) }),
  );
  return element(
    "table",
    { class: "lanes-table lanes-figures" },
    element("caption", { text: t("lanes.table.latency") }),
    element("thead", {}, element("tr", {}, ...heads)),
    element("tbody", {}, ...rows),
  );
}

/**
 * What one piece of work is.
 * @param {import("./model.js").LanesModel} model
 * @param {import("./model.js").Lane} lane
 * @param {import("./model.js").Work} work
 * @param {(key: number) => number} streamOf
 * @param {any} context of the shell
 */
export function workInWords(model, lane, work, streamOf, { t, language }) {
  const parts = [`${lane.worker}: ${t(`lanes.work.${work.name}`)}`];
  const isOver = work.duration < Infinity;
  parts.push(isOver ? t("lanes.ms", { ms: number(work.duration, language, 1) }) : t("lanes.goes.on"));
  if (work.steps > 1) parts.push(t("lanes.steps", { steps: work.steps }));
  if (work.amount) {
    const unit = work.name === "encode" || work.name === "decode picture" ? "patches" : "tokens";
    parts.push(t(`lanes.${unit}`, { amount: number(work.amount, language) }));
  }
  for (const key of work.requests.slice(0, 6)) parts.push(requestInWords(model, key, streamOf, t));
  if (work.requests.length > 6) parts.push(`+ ${work.requests.length - 6}`);
  return parts.join(", ");
}

/** @param {import("./model.js").LanesModel} model @param {number} key @param {(key: number) => number} streamOf
 * @param {any} t */
function requestInWords(model, key, streamOf, t) {
  const stream = key ? streamOf(key) : -1;
  if (stream >= 0) return t("lanes.stream", { number: stream + 1 });
  const request = model.requests.get(key);
  if (!request) return t("lanes.request.hidden");
  const id = request.id.length > 18 ? `${request.id.slice(0, 17)}…` : request.id;
  return t(request.isMine ? "lanes.request.mine" : "lanes.request.other", { id });
}
