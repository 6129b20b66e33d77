// Before the first paint, so that a dark page does not flash up in light colours.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("vlm.theme");
  } catch {
    // Storage is turned off: the system's theme is taken.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
