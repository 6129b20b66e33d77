// Pictures and videos: which files are taken, and how they are shown.

import { element } from "./dom.js";
import { t } from "./i18n.js";
import { library } from "./library.js";

/** @typedef {import("./store.js").Media} Media */

export const ACCEPTED = "image/*,video/*,.heic,.avif,.mkv";
const BY_ENDING = {
  image: /\.(avif|bmp|gif|heic|heif|ico|jpe?g|png|tiff?|webp)$/i,
  video: /\.(avi|m4v|mkv|mov|mp4|mpe?g|webm|wmv)$/i,
};

/** @param {File} file @returns {"image"|"video"|null} null: neither, by what the browser knows of it */
export function kindOf(file) {
  for (const kind of /** @type {const} */ (["image", "video"])) {
    if (file.type.startsWith(`${kind}/`) || (!file.type && BY_ENDING[kind].test(file.name))) return kind;
  }
  return null;
}

/**
 * A small view of it. What the browser cannot show has its name only.
 * @param {Media} media
 * @returns {HTMLElement}
 */
export function mediaView(media) {
  const figure = element("figure", { class: `media media-${media.kind}` });
  const name = () => element("figcaption", { text: media.name || t(media.kind), title: media.name });
  library.url(media).then((url) => {
    if (!url) {
      figure.append(name());
      return;
    }
    const shown =
      media.kind === "image"
        ? element("img", { alt: media.name || t("image") })
        : element("video", { controls: true, muted: true, preload: "metadata", "aria-label": media.name || t("video") });
    shown.addEventListener("error", () => {
      shown.remove();
      figure.append(name());
    });
    shown.src = url;
    figure.prepend(shown);
  });
  return figure;
}
