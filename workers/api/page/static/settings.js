// What the browser keeps of the user's choices. The key stays in the tab unless the user wants it remembered.

const PREFIX = "vlm.";

/** @param {Storage} storage @param {string} name @returns {string|null} */
function read(storage, name) {
  try {
    return storage.getItem(PREFIX + name);
  } catch {
    return null;
  }
}

/** @param {Storage} storage @param {string} name @param {string|null} value */
function write(storage, name, value) {
  try {
    if (value === null) storage.removeItem(PREFIX + name);
    else storage.setItem(PREFIX + name, value);
  } catch {
    // Storage is turned off or full: the choice holds until the page is closed.
  }
}

export const choices = {
  /** @param {string} name @returns {any} */
  get(name) {
    const text = read(localStorage, name);
    try {
      return text === null ? null : JSON.parse(text);
    } catch {
      return text;
    }
  },
  /** @param {string} name @param {any} value null removes it */
  set(name, value) {
    write(localStorage, name, value === null ? null : typeof value === "string" ? value : JSON.stringify(value));
  },
};

let current = read(sessionStorage, "key") || read(localStorage, "key") || "";

export const key = {
  get value() {
    return current;
  },
  get isRemembered() {
    return read(localStorage, "key") !== null;
  },
  /** @param {string} value @param {boolean} isRemembered */
  set(value, isRemembered) {
    current = value;
    write(sessionStorage, "key", value || null);
    write(localStorage, "key", value && isRemembered ? value : null);
  },
};
