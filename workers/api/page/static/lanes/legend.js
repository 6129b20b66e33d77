// What the colours and forms of the lanes mean.

import { element } from "../dom.js";
import { requestColour, streamColour } from "./colours.js";
import { NUM_STREAMS } from "./demo.js";

const ENTRIES = ["streams", "pictures", "others", "fetch", "solid", "prefill", "replaced"];
const WARM_KEYS = [2, 5, 8]; // of requests whose colours are shown
const KIND = 2; // of these: the one that shows kinds of work; it is not the colour of an alert

/** @param {any} t @returns {any} the element, without colours yet */
export function legend(t) {
  return element(
    "ul",
    { class: "lanes-legend", "aria-label": t("lanes.legend") },
    ...ENTRIES.map((name) =>
      element(
        "li",
        { class: `legend-${name}` },
        element("span", { class: "swatch", "aria-hidden": "true" }),
        t(`lanes.legend.${name}`),
      ),
    ),
  );
}

/** @param {HTMLElement} shown @param {import("./colours.js").Inks} inks */
export function colourLegend(shown, inks) {
  const { theme } = inks;
  const cool = Array.from({ length: NUM_STREAMS }, (_, index) => streamColour(index, theme));
  const warm = WARM_KEYS.map((key) => requestColour(key, theme));
  const backgrounds = {
    streams: `linear-gradient(${bands(cool)})`,
    pictures: `linear-gradient(90deg, ${bands(warm)})`,
    others: inks.others,
    fetch: warm[KIND],
    solid: warm[KIND],
    prefill: `linear-gradient(${inks.text} 4px, ${cool[0]} 4px)`,
    replaced: `linear-gradient(90deg, ${inks.alert} 2px, transparent 2px), repeating-linear-gradient(135deg, ${inks.alert} 0 1px, transparent 1px 5px)`,
  };
  for (const [name, background] of Object.entries(backgrounds)) {
    const swatch = /** @type {HTMLElement} */ (shown.querySelector(`.legend-${name} .swatch`));
    swatch.style.background = background;
  }
}

/** @param {string[]} colours @returns {string} the stops of a gradient in which each has a part */
function bands(colours) {
  const share = 100 / colours.length;
  return colours.map((colour, index) => `${colour} ${index * share}% ${(index + 1) * share}%`).join(", ");
}
