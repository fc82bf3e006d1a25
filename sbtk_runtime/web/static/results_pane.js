// The results pane: runs searches, and shows the results or the reason why there are none.

import { ApiError, getGallery, getPhoto, thumbnailUrl } from "./api.js";
import { announceSoon, byId } from "./dom.js";
import {
  EMPTY_FOLDER,
  EMPTY_GALLERY,
  NO_OTHER_PHOTO,
  PHOTO_NOT_FOUND,
  errorMessage,
  showMessage,
  statusMessage,
  welcomeMessage,
} from "./empty_state.js";
import { displayName, displayPath } from "./paths.js";
import { ResultsGrid, scoreText } from "./results_grid.js";
import { Search } from "./search.js";
import { showStatus } from "./server_status.js";

/** @typedef {import("./api.js").Folder} Folder */
/** @typedef {import("./api.js").Gallery} Gallery */
/** @typedef {import("./api.js").QueryResponse} QueryResponse */
/** @typedef {import("./server_status.js").ServerMonitor} ServerMonitor */
/** @typedef {import("./search.js").Query} Query */
/** @typedef {{ path: string, label: string, depth: number, count: number }} FolderOption */
/** @typedef {{ path: string, count: number, children: Map<string, FolderNode> }} FolderNode `count` is without subfolders */

const PRELOAD_PX = 500;

export class ResultsPane {
  grid = new ResultsGrid(byId("hits", HTMLOListElement));
  /** @type {Gallery | null} */
  #gallery = null;
  /** @type {FolderOption[]} */
  #folders = [];
  /** @type {ApiError | null} */
  #error = null;
  /** @type {number | null} */
  #like = null;
  #hasResponse = false;
  /** Whether there is nothing to search for, such as on an empty canvas. */
  #isBlank = false;
  /** @type {number | null} the generation of the last response */
  #generation = null;
  #isReady = false;
  #folderSelect = byId("folder", HTMLSelectElement);
  #region = byId("results", HTMLElement);
  #moreButton = byId("load-more", HTMLButtonElement);

  /**
   * @param {ServerMonitor} monitor
   * @param {() => Query | null} currentQuery
   */
  constructor(monitor, currentQuery) {
    this.monitor = monitor;
    this.currentQuery = currentQuery;
    this.search = new Search(currentQuery, () => this.#photoCount);
    this.search.addEventListener("request", () => this.#region.setAttribute("aria-busy", "true"));
    this.search.addEventListener("response", (event) => {
      const { response, isMore } = /** @type {CustomEvent} */ (event).detail;
      this.#showResponse(response, isMore);
    });
    this.search.addEventListener("blank", () => this.#showBlank());
    this.search.addEventListener("failure", (event) => this.#showError(/** @type {CustomEvent} */ (event).detail));
    monitor.addEventListener("change", () => this.#statusChanged());
    this.#moreButton.addEventListener("click", () => this.search.loadMore());
    byId("retry", HTMLButtonElement).addEventListener("click", () => this.run());
    window.addEventListener("scroll", () => this.#loadMoreNearEnd(), { passive: true });
    this.#update();
  }

  /** Searches now. */
  run() {
    this.#hasResponse = false;
    this.search.run();
  }

  /** Searches soon, while a stroke is being drawn. */
  schedule() {
    this.search.schedule();
  }

  /**
   * Shows photos similar to a photo, or for null those similar to the drawing.
   * @param {number | null} id
   */
  showSimilar(id) {
    if (id === this.#like) return;
    this.#like = id;
    byId("similar-bar", HTMLElement).hidden = id === null;
    if (id !== null) void this.#showSimilarBar(id);
    this.run();
    if (this.#region.getBoundingClientRect().top < 0) this.#region.scrollIntoView();
  }

  #loadMoreNearEnd() {
    const isNearEnd = this.#moreButton.getBoundingClientRect().top < window.innerHeight + PRELOAD_PX;
    if (isNearEnd && !this.#moreButton.hidden) this.search.loadMore();
  }

  /** @param {number} id */
  async #showSimilarBar(id) {
    byId("similar-image", HTMLImageElement).src = thumbnailUrl(id, 180);
    const name = byId("similar-name", HTMLElement);
    const hit = this.grid.hits.find((one) => one.id === id);
    name.textContent = hit ? displayName(hit) : `photo ${id}`;
    if (hit) return;
    try {
      const photo = await getPhoto(id);
      if (this.#like === id) name.textContent = displayName(photo);
    } catch {
      // The search shows the error.
    }
  }

  /**
   * @param {QueryResponse} response
   * @param {boolean} isMore
   */
  #showResponse(response, isMore) {
    this.#region.setAttribute("aria-busy", "false");
    this.#error = null;
    this.#hasResponse = true;
    this.#isBlank = false;
    // Hits of two generations do not mix. A response with more hits contains the first ones too.
    const isSameGeneration = response.generation === this.#generation;
    this.#generation = response.generation;
    const { hits } = response;
    let hasNewHits = true;
    if (isMore && isSameGeneration) hasNewHits = this.grid.append(hits) > 0;
    else this.grid.show(hits);
    performance.clearMarks("sbtk:shown");
    performance.mark("sbtk:shown", { detail: { hits: hits.length, isMore } });
    this.#moreButton.hidden = !hasNewHits || hits.length === 0 || !this.search.hasMore;
    const duration = isMore ? "" : ` · ${Math.max(1, Math.round(response.took_ms))} ms`;
    byId("result-count", HTMLElement).textContent = hits.length > 0 ? `${this.#countText()}${duration}` : "";
    const notices = byId("notices", HTMLElement);
    // The empty state explains an empty gallery.
    notices.textContent = this.#gallery?.count === 0 ? "" : (response.notices ?? []).join(" · ");
    notices.hidden = notices.textContent === "";
    if (!isMore && hits.length > 0) {
      announceSoon(`${hits.length} photos found. Best match: ${displayName(hits[0])}, score ${scoreText(hits[0].score)}.`);
    } else if (isMore && hasNewHits) {
      announceSoon(`${this.grid.hits.length} photos shown.`);
    }
    if (this.#gallery !== null && response.generation !== this.#gallery.generation) void this.monitor.check();
    this.#update();
  }

  #showBlank() {
    this.#isBlank = true;
    this.#region.setAttribute("aria-busy", "false");
    this.#error = null;
    this.#clearHits();
    this.#update();
  }

  /** @param {ApiError} error */
  #showError(error) {
    this.#region.setAttribute("aria-busy", "false");
    this.monitor.report(error);
    // The server's status explains these errors.
    const isStatus = ["unreachable", "loading", "no_token"].includes(error.code);
    this.#error = isStatus ? null : error;
    if (!isStatus) this.#clearHits();
    this.#update();
  }

  #statusChanged() {
    const wasReady = this.#isReady;
    this.#isReady = this.monitor.status === "ok";
    if (this.#isReady) {
      this.grid.retryFailed();
      void this.#loadGallery();
      const isOutdated = this.#generation !== this.monitor.health.generation;
      if ((!wasReady || isOutdated) && this.currentQuery() !== null && !this.search.isPending) this.run();
    }
    showStatus(this.monitor, this.#gallery);
    this.#update();
  }

  async #loadGallery() {
    if (this.#gallery !== null && this.#gallery.generation === this.monitor.health.generation) return;
    try {
      this.#gallery = await getGallery();
    } catch (error) {
      if (error instanceof ApiError) this.monitor.report(error);
      return;
    }
    this.#folders = folderOptions(this.#gallery.folders);
    const selected = this.#folderSelect.value;
    fillSelect(this.#folderSelect, this.#folders);
    if (this.#folderSelect.value !== selected && this.currentQuery() !== null) this.run();
    byId("folder-field", HTMLElement).hidden = this.#folders.length < 2;
    showStatus(this.monitor, this.#gallery);
    this.#update();
  }

  /** @returns {number} the photos in the selected folder */
  get #photoCount() {
    const folder = this.#folders.find(({ path }) => path === this.#folderSelect.value);
    return folder?.count ?? this.#gallery?.count ?? this.monitor.health.photos ?? Infinity;
  }

  #countText() {
    const shown = this.grid.hits.length.toLocaleString("en");
    const total = this.#photoCount;
    return Number.isFinite(total) ? `${shown} of ${total.toLocaleString("en")}` : shown;
  }

  #clearHits() {
    this.grid.clear();
    this.#moreButton.hidden = true;
    byId("result-count", HTMLElement).textContent = "";
    byId("notices", HTMLElement).hidden = true;
  }

  #update() {
    const isEmpty = this.grid.hits.length === 0;
    this.#region.classList.toggle("has-hits", !isEmpty);
    showMessage(statusMessage(this.monitor.status, this.monitor.health) ?? this.#message(isEmpty));
  }

  /** @param {boolean} isEmpty */
  #message(isEmpty) {
    if (this.#error?.code === "no_photo") return PHOTO_NOT_FOUND;
    if (this.#error !== null) return errorMessage(this.#error.message, this.#error.next, true);
    if (this.#gallery?.count === 0) return EMPTY_GALLERY;
    if (!isEmpty) return null;
    if (this.#isBlank || this.currentQuery() === null) return welcomeMessage(this.#gallery?.count ?? 0);
    if (!this.#hasResponse || this.#gallery === null) return null;
    return this.#folderSelect.value === "" ? NO_OTHER_PHOTO : EMPTY_FOLDER;
  }
}

/**
 * Returns the options of the folder filter: folders with photos, and parents that have several subfolders.
 * Folders whose names are not UTF-8 cannot be used in a query and are left out.
 * @param {readonly Folder[]} folders
 * @returns {FolderOption[]} parents before their subfolders
 */
function folderOptions(folders) {
  /** @type {FolderNode} */
  const root = { path: "", count: 0, children: new Map() };
  for (const folder of folders) {
    if (folder.path == null) continue;
    let node = root;
    for (const part of folder.path.split("/").filter(Boolean)) {
      let child = node.children.get(part);
      if (child === undefined) {
        child = { path: `${node.path}/${part}`, count: 0, children: new Map() };
        node.children.set(part, child);
      }
      node = child;
    }
    node.count += folder.count;
  }
  /** @type {FolderOption[]} */
  const options = [];
  for (const child of root.children.values()) addOptions(child, 0, "", options);
  return options;
}

/**
 * @param {FolderNode} node
 * @param {number} depth
 * @param {string} prefix the names of parents that contain only this folder
 * @param {FolderOption[]} options
 */
function addOptions(node, depth, prefix, options) {
  const label = prefix + displayName({ path: node.path });
  const children = [...node.children.values()];
  if (node.count === 0 && children.length === 1) {
    // The path to the topmost option is left out.
    addOptions(children[0], depth, depth === 0 ? "" : `${label}/`, options);
    return;
  }
  options.push({ path: node.path, label, depth, count: totalCount(node) });
  for (const child of children) addOptions(child, depth + 1, "", options);
}

/**
 * @param {FolderNode} node
 * @returns {number}
 */
function totalCount(node) {
  return node.count + [...node.children.values()].reduce((sum, child) => sum + totalCount(child), 0);
}

/**
 * Fills the folder filter and keeps the selected folder if it still exists.
 * @param {HTMLSelectElement} select
 * @param {readonly FolderOption[]} folders
 */
function fillSelect(select, folders) {
  const selected = select.value;
  const options = folders.map(({ path, label, depth, count }) => {
    const option = new Option(`${"\u2003".repeat(depth)}${label} (${count.toLocaleString("en")})`, path);
    option.title = displayPath({ path });
    return option;
  });
  select.replaceChildren(new Option("All folders", ""), ...options);
  select.value = folders.some(({ path }) => path === selected) ? selected : "";
}
