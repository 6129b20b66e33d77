// Colours of requests: the streams that this page has sent have cool ones, all others warm ones.

export const NUM_STREAM_COLOURS = 4;
const STREAMS = {
  light: ["#1d4ed8", "#0891b2", "#6d28d9", "#0f766e"],
  dark: ["#60a5fa", "#22d3ee", "#a78bfa", "#2dd4bf"],
};
const WARM = { light: [46, 58], dark: [62, 70] }; // lightness in percent, in turn
const FIRST_HUE = 325;
const NUM_HUES = 100; // degrees of the wheel, through red and yellow

/** @typedef {"light"|"dark"} Theme */

/** @returns {Theme} that is shown now */
export function shownTheme() {
  const scheme = getComputedStyle(document.documentElement).colorScheme;
  if (scheme === "light" || scheme === "dark") return scheme;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

/** @param {number} index @param {Theme} theme */
export function streamColour(index, theme) {
  return STREAMS[theme][index % NUM_STREAM_COLOURS];
}

/** @param {number} key of a request that is no stream @param {Theme} theme */
export function requestColour(key, theme) {
  const hue = (FIRST_HUE + ((key * 47) % NUM_HUES)) % 360;
  return `hsl(${hue} 85% ${WARM[theme][key % 2]}%)`;
}

/** What else is drawn, as the page's style has it. */
export function inks() {
  const isDark = shownTheme() === "dark";
  return {
    theme: shownTheme(),
    text: isDark ? "#e8eae8" : "#1b1f1e",
    soft: isDark ? "#a3aba8" : "#565e5b",
    line: isDark ? "#33383c" : "#dcdfdb",
    ground: isDark ? "#1e2124" : "#ffffff",
    others: isDark ? "#5c6468" : "#b3b9b5",
    alert: isDark ? "#ff9b91" : "#b42318",
    font: `12px ${getComputedStyle(document.body).fontFamily || "sans-serif"}`,
  };
}
/** @typedef {ReturnType<typeof inks>} Inks */
