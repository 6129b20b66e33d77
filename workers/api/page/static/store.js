// Keeps chats in the browser's IndexedDB: chats without their media in one store, each picture and video in another.
//
// Where the browser offers no storage (some private windows), chats live until the page is closed.

/**
 * @typedef {{id: string, kind: "image"|"video", name: string, type: string, size: number}} Media
 * @typedef {{id: string, name: string, arguments: string}} Call
 * @typedef {{ttft: number|null, rate: number|null, prompt: number, output: number, thoughts: number,
 *   cached: number, media: Object<string, number>|null}} Figures
 * @typedef {{id: string, role: "user"|"assistant"|"tool", text: string, media: Media[], thoughts?: string,
 *   calls?: Call[], callId?: string, name?: string, finish?: string, error?: string, figures?: Figures}} Turn
 * @typedef {{id: string, title: string, isNamed: boolean, created: number, updated: number, turns: Turn[],
 *   settings: Object<string, any>}} Chat
 */

const NAME = "vlm-pipeline";
const VERSION = 1;

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** @returns {Promise<IDBDatabase|null>} */
async function openDatabase() {
  try {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("chats", { keyPath: "id" });
      request.result.createObjectStore("media");
    };
    return await result(request);
  } catch {
    return null;
  }
}

export class Store {
  /** @param {IDBDatabase|null} database */
  constructor(database) {
    this.database = database;
    /** @type {Map<string, Blob>} where there is no database, or no room in it */
    this.blobs = new Map();
  }

  static async open() {
    return new Store(await openDatabase());
  }

  /** @param {string} name @param {IDBTransactionMode} mode */
  objects(name, mode) {
    return /** @type {IDBDatabase} */ (this.database).transaction(name, mode).objectStore(name);
  }

  /** @returns {Promise<Chat[]>} the latest first */
  async chats() {
    if (!this.database) return [];
    const found = await result(this.objects("chats", "readonly").getAll());
    return found.sort((one, other) => other.updated - one.updated);
  }

  /** @param {Chat} chat */
  async save(chat) {
    if (this.database) await result(this.objects("chats", "readwrite").put(structuredClone(chat)));
  }

  /** @param {Chat} chat */
  async remove(chat) {
    if (this.database) await result(this.objects("chats", "readwrite").delete(chat.id));
    for (const turn of chat.turns) await this.removeMedia(turn.media);
  }

  /** @param {Media[]} media */
  async removeMedia(media) {
    for (const { id } of media) {
      this.blobs.delete(id);
      if (this.database) await result(this.objects("media", "readwrite").delete(id));
    }
  }

  /** @param {Media} media @param {Blob} blob */
  async saveMedia(media, blob) {
    this.blobs.set(media.id, blob);
    if (!this.database) return;
    await result(this.objects("media", "readwrite").put(blob, media.id));
    this.blobs.delete(media.id);
  }

  /** @param {Media} media @returns {Promise<Blob|null>} */
  async blob(media) {
    const kept = this.blobs.get(media.id);
    if (kept || !this.database) return kept ?? null;
    return (await result(this.objects("media", "readonly").get(media.id))) ?? null;
  }
}
