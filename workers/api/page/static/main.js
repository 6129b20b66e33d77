// The shell: the bar on top, the views, language and theme, and the key.
//
// A view is a module NAME.js beside this file that exports
//
//   mount(element, context) → unmount, or a promise of it
//
// `element` is an empty element of the view alone; `unmount()` ends all that the view has begun (timers, streams).
// It is loaded when it is first shown, at #NAME or #NAME/WHATEVER. The server names the views that it has
// (`views` of /page/setup.json), and only these are in the bar. A module may also export `strings`,
// {en: {key: text}, zh: {key: text}}, which `t` then knows; and `ignoresTheme = true` if all its colours are CSS.
// `context` has
//
//   request(path, init)   fetch with the key. A 401 asks the user for a key and tries again; any other answer
//                         that is not ok throws an ApiError, whose message is the server's own sentence
//   t(key, values)        the string in the user's language
//   language, theme       "en" or "zh"; "light" or "dark", as shown now. When one changes, the view is mounted
//                         anew (but for a theme that it ignores)
//   onError(error)        shows an error to the user, in words
//   setup                 what /page/setup.json says
//   rest                  what follows the view's name in the address: "WHATEVER"

import { announce, element, iconButton } from "./dom.js";
import { addStrings, language, LANGUAGES, setLanguage, t } from "./i18n.js";
import { choices, key } from "./settings.js";
import { askForKey } from "./key_dialog.js";
import { request, setKeyAsker } from "./api.js";

const THEMES = /** @type {const} */ (["auto", "light", "dark"]);
const THEME_ICONS = /** @type {const} */ ({ auto: "auto", light: "sun", dark: "moon" });
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
const main = /** @type {HTMLElement} */ (document.getElementById("content"));

let setup = { needs_key: false, views: ["chat"], max_request_mib: 64, samples: [] };
let shown = { view: "", rest: "" };
let unmount = () => {};
let ignoresTheme = false; // the shown view
let turn = 0; // counts views, as a view's module may arrive after the next view was chosen

/** @returns {"auto"|"light"|"dark"} */
function chosenTheme() {
  const chosen = choices.get("theme");
  return THEMES.includes(chosen) ? chosen : "auto";
}

/** @returns {"light"|"dark"} */
function shownTheme() {
  const chosen = chosenTheme();
  return chosen === "auto" ? (darkSystem.matches ? "dark" : "light") : chosen;
}

function nextTheme() {
  const next = THEMES[(THEMES.indexOf(chosenTheme()) + 1) % THEMES.length];
  choices.set("theme", next === "auto" ? null : next);
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  drawBar();
  document.getElementById("theme")?.focus();
  announce(t(`theme.${next}`));
  onTheme();
}

function onTheme() {
  if (!ignoresTheme) showView();
}

/** @param {string} chosen */
function chooseLanguage(chosen) {
  setLanguage(/** @type {"en"|"zh"} */ (chosen));
  drawBar();
  document.getElementById("language")?.focus();
  showView();
}

function drawBar() {
  document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
  const skip = /** @type {HTMLElement} */ (document.querySelector(".skip-link"));
  skip.textContent = t("skip");
  const views = /** @type {HTMLElement} */ (document.getElementById("views"));
  views.setAttribute("aria-label", t("views"));
  views.replaceChildren(...setup.views.map((view) => viewLink(view)));
  views.hidden = setup.views.length < 2;
  const theme = chosenTheme();
  const languages = element(
    "select",
    {
      id: "language",
      "aria-label": t("language"),
      on: { change: (/** @type {any} */ event) => chooseLanguage(event.target.value) },
    },
    ...Object.entries(LANGUAGES).map(([value, text]) =>
      element("option", { value, text, lang: value, selected: value === language() }),
    ),
  );
  const tools = /** @type {HTMLElement} */ (document.getElementById("tools"));
  tools.replaceChildren(
    ...(setup.needs_key ? [iconButton("key", t("key.change"), () => changeKey(), { id: "key" })] : []),
    languages,
    iconButton(THEME_ICONS[theme], `${t("theme")}: ${t(`theme.${theme}`)}`, nextTheme, { id: "theme" }),
  );
}

/** @param {string} view */
function viewLink(view) {
  const isCurrent = view === shown.view;
  return element("a", { href: `#${view}`, text: t(`view.${view}`), "aria-current": isCurrent && "page" });
}

async function changeKey() {
  if (await askForKey({ isWrong: false })) location.reload();
}

/** @returns {{view: string, rest: string}} */
function addressed() {
  const [view, ...rest] = location.hash.slice(1).split("/");
  return setup.views.includes(view) ? { view, rest: rest.join("/") } : { view: setup.views[0], rest: "" };
}

async function showView() {
  const mine = ++turn;
  unmount();
  unmount = () => {};
  shown = addressed();
  drawBar();
  const place = element("div", { class: `view view-${shown.view}` });
  main.replaceChildren(place);
  try {
    const module = await import(`./${shown.view}.js`);
    if (module.strings) addStrings(module.strings);
    if (mine !== turn) return;
    ignoresTheme = Boolean(module.ignoresTheme);
    const context = {
      request, t, language: language(), theme: shownTheme(), onError: showError, setup, rest: shown.rest,
    };
    const ended = await module.mount(place, context);
    if (mine === turn) unmount = ended;
    else ended();
  } catch (error) {
    if (mine === turn) showError(error);
  }
}

/** @param {any} error */
function showError(error) {
  document.querySelector(".toast")?.remove();
  const text = error instanceof Error ? error.message : String(error);
  const toast = element(
    "div",
    { class: "toast", role: "alert" },
    element("span", { text }),
    iconButton("close", t("close"), () => toast.remove()),
  );
  document.body.append(toast);
}

async function showModel() {
  const place = /** @type {HTMLElement} */ (document.getElementById("model"));
  try {
    const models = await (await request("/v1/models")).json();
    place.textContent = models.data[0].id;
    place.title = t("model.title", { name: models.data[0].id, tokens: models.data[0].max_model_len });
  } catch (error) {
    showError(error);
  }
}

async function start() {
  document.querySelector(".skip-link")?.addEventListener("click", (event) => {
    event.preventDefault(); // the address names the view
    main.focus();
  });
  drawBar();
  setKeyAsker(askForKey);
  try {
    setup = await (await fetch("/page/setup.json")).json();
  } catch (error) {
    showError(t("error.unreachable"));
  }
  addEventListener("hashchange", () => {
    const next = addressed();
    // A view that changes what follows its own name in the address has drawn that itself.
    if (next.view !== shown.view) showView();
  });
  darkSystem.addEventListener("change", () => chosenTheme() === "auto" && onTheme());
  showView();
  await showModel();
}

start();
