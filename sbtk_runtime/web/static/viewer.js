// One photo, large: where it is, and the way to photos like it.

import { Problem, fileUrl, photo, thumbnailUrl } from "./api.js";
import { say } from "./announce.js";
import { copyText } from "./clipboard.js";
import { exactPathOf, nameOf, pathOf } from "./names.js";
import { byId, enable } from "./page.js";
import { closePhoto, swap } from "./place.js";
import { copiesText } from "./results.js";

/** @typedef {import("./api.js").Hit} Hit */
/** @typedef {import("./api.js").Photo} Photo */
/** @typedef {import("./results.js").Results} Results */

const SIZES_PX = [720, 1600];

/** Dispatches "like" (detail: the id). */
export class Viewer extends EventTarget {
  /** @type {number | null} */
  id = null;
  #dialog = byId("viewer", HTMLDialogElement);
  #image = byId("viewer-image", HTMLImageElement);
  /** @type {AbortController} */
  #asking = new AbortController();
  /** @type {Photo | null} */
  #photo = null;

  /** @param {Results} results */
  constructor(results) {
    super();
    this.results = results;
    // Browsers close dialogs in ways of their own too: by Escape, or the phone's Back.
    this.#dialog.addEventListener("close", () => {
      if (this.id !== null && !this.#dialog.open) closePhoto();
    });
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close();
    });
    this.#dialog.addEventListener("keydown", (event) => this.#key(event));
    byId("viewer-close", HTMLButtonElement).addEventListener("click", () => this.#dialog.close());
    byId("viewer-before", HTMLButtonElement).addEventListener("click", () => this.#step(-1));
    byId("viewer-after", HTMLButtonElement).addEventListener("click", () => this.#step(1));
    byId("viewer-copy", HTMLButtonElement).addEventListener("click", () => void this.#copy());
    byId("viewer-like", HTMLButtonElement).addEventListener("click", () => this.#like());
    this.#image.addEventListener("error", () => this.#trouble("The photo cannot be shown: it may have been moved."));
  }

  /** @param {number} id */
  open(id) {
    if (this.id === id) return;
    this.id = id;
    this.#asking.abort();
    this.#asking = new AbortController();
    this.#photo = null;
    const hit = this.results.hits.find((one) => one.id === id);
    this.#dialog.classList.remove("is-troubled");
    this.#picture(id);
    this.#title(hit ? nameOf(hit) : "Photo", hit ? pathOf(hit) : "");
    byId("viewer-facts", HTMLElement).textContent = "";
    this.#copies(hit);
    byId("viewer-file", HTMLAnchorElement).href = fileUrl(id);
    this.#neighbours();
    if (!this.#dialog.open) this.#dialog.showModal();
    void this.#describe(id, this.#asking.signal);
  }

  close() {
    const { id } = this;
    if (id === null) return;
    this.id = null;
    this.#asking.abort();
    this.#image.removeAttribute("src");
    this.#dialog.close();
    this.results.focus(id);
  }

  /**
   * Shows the thumbnail that is there already until the large one is.
   * @param {number} id
   */
  #picture(id) {
    const shown = this.results.thumbnailOf(id);
    const neededPx = Math.min(2, window.devicePixelRatio) * Math.min(window.innerWidth, window.innerHeight);
    const large = new Image();
    large.src = thumbnailUrl(id, neededPx <= SIZES_PX[0] ? SIZES_PX[0] : SIZES_PX[1]);
    this.#image.classList.toggle("is-coming", shown !== null);
    // Else the photo before would stay in sight, under this one's name.
    if (shown === null) this.#image.removeAttribute("src");
    this.#image.src = shown ?? large.src;
    if (shown === null) return;
    const finish = () => {
      if (this.id !== id) return;
      this.#image.src = large.src;
      this.#image.classList.remove("is-coming");
    };
    large.decode().then(finish, finish);
  }

  /**
   * @param {number} id
   * @param {AbortSignal} signal
   */
  async #describe(id, signal) {
    try {
      const found = await photo(id, signal);
      this.#photo = found;
      this.#title(nameOf(found), pathOf(found));
      const day = new Date(found.modified).toLocaleDateString("en-GB", { dateStyle: "long" });
      byId("viewer-facts", HTMLElement).textContent = `${sizeText(found.size_bytes)} · ${day}`;
    } catch (error) {
      if (!signal.aborted && error instanceof Problem) this.#trouble(error.message);
    }
  }

  /**
   * Lists the other photos of the same bytes.
   * @param {Hit | undefined} hit
   */
  #copies(hit) {
    const details = byId("viewer-copies", HTMLDetailsElement);
    details.hidden = !hit?.copies?.length;
    details.open = false;
    const summary = details.querySelector("summary");
    if (summary !== null) summary.textContent = hit ? copiesText(hit) : "";
    const items = (hit?.copies ?? []).map((copy) => {
      const item = document.createElement("li");
      item.textContent = pathOf(copy);
      return item;
    });
    details.querySelector("ul")?.replaceChildren(...items);
  }

  /**
   * @param {string} name
   * @param {string} path
   */
  #title(name, path) {
    byId("viewer-name", HTMLElement).textContent = name;
    byId("viewer-path", HTMLElement).textContent = path;
    byId("viewer-copy", HTMLButtonElement).disabled = path === "";
    this.#image.alt = name;
  }

  /** @param {string} text */
  #trouble(text) {
    if (this.id === null || !this.#image.hasAttribute("src")) return;
    this.#dialog.classList.add("is-troubled");
    byId("viewer-trouble", HTMLElement).textContent = text;
  }

  /** @param {number} way */
  #neighbour(way) {
    const index = this.results.hits.findIndex((hit) => hit.id === this.id);
    return index < 0 ? null : (this.results.hits[index + way]?.id ?? null);
  }

  #neighbours() {
    enable([
      [byId("viewer-before", HTMLButtonElement), this.#neighbour(-1) !== null],
      [byId("viewer-after", HTMLButtonElement), this.#neighbour(1) !== null],
      [byId("viewer-close", HTMLButtonElement), true],
    ]);
  }

  /** @param {number} way */
  #step(way) {
    const id = this.#neighbour(way);
    if (id !== null) swap({ photo: id });
  }

  #like() {
    if (this.id !== null) this.dispatchEvent(new CustomEvent("like", { detail: this.id }));
  }

  async #copy() {
    const known = this.#photo ?? this.results.hits.find((hit) => hit.id === this.id);
    const exact = known ? exactPathOf(known) : null;
    const isCopied = await copyText(exact ?? byId("viewer-path", HTMLElement).textContent ?? "");
    if (!isCopied) say("The browser did not let the path be copied.");
    else say(exact === null ? "Path copied; its name is no text, so some of it is escaped." : "Path copied.");
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") this.#step(-1);
    else if (event.key === "ArrowRight") this.#step(1);
    else return;
    event.preventDefault();
  }
}

/** @param {number} bytes */
function sizeText(bytes) {
  if (bytes < 1 << 20) return `${Math.max(1, Math.round(bytes / 1024))} KiB`;
  return `${(bytes / (1 << 20)).toFixed(1)} MiB`;
}
