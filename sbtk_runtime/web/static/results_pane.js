// The results pane: runs searches, and shows the photos or the reason why there are none.

import { ApiError, getGallery } from "./api.js";
import { announceSoon, byId } from "./dom.js";
import {
  EMPTY_DAYS,
  EMPTY_FOLDER,
  FIRST_PHOTOS,
  NO_OTHER_PHOTO,
  PHOTO_NOT_FOUND,
  emptyGalleryMessage,
  errorMessage,
  showMessage,
  statusMessage,
} from "./empty_state.js";
import { showFeedback, withoutFeedback } from "./feedback.js";
import { currentFilter, hasDays } from "./filters.js";
import { displayName, displayPath } from "./paths.js";
import { ResultsGrid, scoreText } from "./results_grid.js";
import { Search } from "./search.js";
import { loadCommand, saveCommand } from "./session_store.js";
import { showStatus } from "./server_status.js";

/** @typedef {import("./api.js").Folder} Folder */
/** @typedef {import("./api.js").Gallery} Gallery */
/** @typedef {import("./api.js").QueryResponse} QueryResponse */
/** @typedef {import("./results_grid.js").Divider} Divider */
/** @typedef {import("./search.js").Query} Query */
/** @typedef {import("./search.js").SearchResult} SearchResult */
/** @typedef {import("./server_status.js").ServerMonitor} ServerMonitor */
/** @typedef {{ path: string, label: string, depth: number, count: number }} FolderOption */
/** @typedef {{ path: string, count: number, children: Map<string, FolderNode> }} FolderNode `count` is without subfolders */

const PRELOAD_PX = 800;
// While a stroke is being drawn, the photos keep their order until the pen has rested for so long.
const REST_MS = 300;
const TITLES = { recent: "Recent photos", similar: "Similar photos", sketch: "Results", photo: "Results" };

export class ResultsPane {
  grid = new ResultsGrid(byId("hits", HTMLOListElement));
  /** @type {Gallery | null} */
  #gallery = null;
  /** @type {FolderOption[]} */
  #folders = [];
  /** @type {ApiError | null} */
  #error = null;
  /** The photos that are liked and not liked, as in the URL. */
  #feedback = "";
  /** Whether the server found the canvas blank, for example after erasing. */
  #isBlank = false;
  /** @type {Query["kind"] | null} what is shown */
  #shown = null;
  /** @type {number | null} the generation of what is shown */
  #generation = null;
  #lastInputMs = -Infinity;
  #responses = 0;
  #isReady = false;
  #folderSelect = byId("folder", HTMLSelectElement);
  #region = byId("results", HTMLElement);
  #moreButton = byId("load-more", HTMLButtonElement);

  /**
   * @param {ServerMonitor} monitor
   * @param {() => Query | null} currentQuery null if there is nothing to search for
   */
  constructor(monitor, currentQuery) {
    this.monitor = monitor;
    this.currentQuery = currentQuery;
    this.search = new Search(
      () => this.#query,
      () => this.#photoCount,
    );
    this.search.addEventListener("request", () => this.#region.setAttribute("aria-busy", "true"));
    this.search.addEventListener("response", (event) => void this.#receive(/** @type {CustomEvent} */ (event).detail));
    this.search.addEventListener("blank", () => this.#searchBlank());
    this.search.addEventListener("failure", (event) => this.#showError(/** @type {CustomEvent} */ (event).detail));
    monitor.addEventListener("change", () => this.#statusChanged());
    this.#moreButton.addEventListener("click", () => this.search.loadMore());
    byId("retry", HTMLButtonElement).addEventListener("click", () => this.run());
    window.addEventListener("scroll", () => this.#loadMoreWithin(PRELOAD_PX), { passive: true });
    this.#update();
  }

  /** Searches now. */
  run() {
    this.#isBlank = false;
    this.#responses += 1;
    this.search.run();
  }

  /** Searches soon, while a stroke is being drawn. */
  schedule() {
    this.#lastInputMs = performance.now();
    this.#isBlank = false;
    this.search.schedule();
  }

  /**
   * Shows photos like those that are liked, and unlike others; without likes, those similar to the drawing.
   * @param {number[]} likes
   * @param {number[]} unlikes
   * @param {string} region the part of the only one that is liked, or ""
   */
  showSimilar(likes, unlikes, region) {
    const feedback = `${likes}/${unlikes}/${region}`;
    if (feedback === this.#feedback || (this.#feedback === "" && feedback === "//")) return;
    this.#feedback = feedback;
    showFeedback(likes, unlikes, region, (id) => this.grid.hits[this.grid.positionOf(id)]);
    this.run();
    if (this.#region.getBoundingClientRect().top < 0) this.#region.scrollIntoView();
  }

  /**
   * Loads more photos if the one with this id is among the last.
   * @param {number} id
   */
  loadMoreAfter(id) {
    if (this.grid.positionOf(id) >= this.grid.hits.length - 3) this.search.loadMore();
  }

  /** @returns {Query} */
  get #query() {
    const query = this.#isBlank ? null : this.currentQuery();
    return query ?? { kind: "recent", filter: currentFilter() };
  }

  /** @param {number} distancePx from the viewport to the end of the photos */
  #loadMoreWithin(distancePx) {
    const isNearEnd = this.#moreButton.getBoundingClientRect().top < window.innerHeight + distancePx;
    if (isNearEnd && !this.#moreButton.hidden) this.search.loadMore();
  }

  /**
   * Shows a response when its first thumbnails are loaded and the pen rests, unless a newer one comes.
   * @param {SearchResult} result
   */
  async #receive(result) {
    this.#responses += 1;
    const current = this.#responses;
    if (!result.isMore) {
      await this.grid.prepare(result.response.hits);
      while (current === this.#responses && this.#restMs > 0) await sleep(this.#restMs);
    }
    if (current === this.#responses) this.#show(result);
  }

  /** @returns {number} how long the photos must keep their order */
  get #restMs() {
    const isSearch = this.#shown !== null && this.#shown !== "recent";
    return isSearch && this.grid.hits.length > 0 ? this.#lastInputMs + REST_MS - performance.now() : 0;
  }

  /** @param {SearchResult} result */
  #show({ response, query, isMore }) {
    const { generation } = response;
    const hits = withoutFeedback(response.hits);
    // Photos of two generations do not mix. While photos are being indexed, the list would start again and again.
    if (isMore && generation !== this.#generation && !this.monitor.health.is_indexing) {
      this.run();
      return;
    }
    this.#region.setAttribute("aria-busy", "false");
    this.#error = null;
    this.#generation = generation;
    if (query.kind !== this.#shown) this.grid.retryFailed();
    this.#shown = query.kind;
    this.#region.dataset.shown = query.kind;
    const divider = dividerOf(hits, isMore ? this.grid.hits.length : 0);
    if (isMore) this.grid.append(hits, divider);
    else this.grid.show(hits, divider);
    performance.clearMarks("sbtk:shown");
    performance.mark("sbtk:shown", { detail: { hits: hits.length, isMore } });
    this.#moreButton.hidden = !this.search.hasMore;
    byId("results-title", HTMLElement).textContent = TITLES[query.kind];
    if (query.kind !== "recent" && !isMore) {
      const notices = byId("notices", HTMLElement);
      // The empty state explains an empty gallery.
      notices.textContent = this.#gallery?.count === 0 ? "" : (response.notices ?? []).join(" · ");
      notices.hidden = notices.textContent === "";
      showDuration(response.took_ms ?? 0);
    }
    this.#announce(query, hits, isMore);
    // The response may be older than the server's status, or newer.
    const { health } = this.monitor;
    if (health.generation != null && generation !== health.generation) void this.monitor.check().then(() => this.#refresh());
    this.#update();
    this.#loadMoreWithin(0);
  }

  /**
   * @param {Query} query
   * @param {QueryResponse["hits"]} hits
   * @param {boolean} isMore
   */
  #announce(query, hits, isMore) {
    if (isMore) {
      announceSoon(`${this.grid.hits.length} photos shown.`);
    } else if (query.kind !== "recent" && hits.length > 0) {
      const [best] = hits;
      const isClose = dividerOf(hits, 0)?.index !== 0;
      const found = isClose ? `${hits.length} photos found. Best match` : "No close match. Best guess";
      announceSoon(`${found}: ${displayName(best)}, score ${scoreText(best.score ?? 0)}.`);
    }
  }

  #searchBlank() {
    this.#isBlank = true;
    this.search.run();
  }

  /** @param {ApiError} error */
  #showError(error) {
    this.#region.setAttribute("aria-busy", "false");
    this.monitor.report(error);
    // The server's status explains these errors.
    const isStatus = ["unreachable", "loading", "no_token"].includes(error.code);
    this.#error = isStatus ? null : error;
    if (!isStatus) {
      this.grid.clear();
      this.#moreButton.hidden = true;
      byId("notices", HTMLElement).hidden = true;
    }
    this.#update();
  }

  #statusChanged() {
    const wasReady = this.#isReady;
    const { status } = this.monitor;
    this.#isReady = status === "ok";
    if (this.#isReady) {
      this.grid.retryFailed();
      void this.#loadGallery();
    }
    this.#refresh(this.#isReady && !wasReady && this.currentQuery() !== null);
    showStatus(this.monitor, this.#gallery);
    this.#update();
  }

  /**
   * Searches again if the photos are of another generation than the server's.
   * @param {boolean} isOutdated if they are outdated for another reason
   */
  #refresh(isOutdated = false) {
    const { status, health } = this.monitor;
    // Photos can be listed while the engine is loading.
    const canRun = this.#isReady || (status === "loading" && health.photos != null && this.currentQuery() === null);
    const isWanted = (isOutdated || this.#generation !== health.generation) && (!health.is_indexing || isAtTop());
    if (canRun && isWanted && !this.search.isPending) this.run();
  }

  async #loadGallery() {
    if (this.#gallery !== null && this.#gallery.generation === this.monitor.health.generation) return;
    try {
      this.#gallery = await getGallery();
    } catch (error) {
      if (error instanceof ApiError) this.monitor.report(error);
      return;
    }
    saveCommand(this.#gallery.command);
    showGalleries(this.#gallery.galleries);
    byId("viewer-mark", HTMLButtonElement).hidden = this.#gallery.regions == null;
    byId("dates-button", HTMLButtonElement).hidden = !this.#gallery.has_dates;
    this.#folders = folderOptions(this.#gallery.folders);
    const selected = this.#folderSelect.value;
    fillSelect(this.#folderSelect, this.#folders);
    if (this.#folderSelect.value !== selected) this.run();
    byId("folder-field", HTMLElement).hidden = this.#folders.length < 2;
    // There may be more photos than when they were requested.
    this.#moreButton.hidden = this.grid.hits.length === 0 || !this.search.hasMore;
    this.#loadMoreWithin(0);
    showStatus(this.monitor, this.#gallery);
    this.#update();
  }

  /** @returns {number} the photos in the selected folder */
  get #photoCount() {
    const folder = this.#folders.find(({ path }) => path === this.#folderSelect.value);
    const { photos, generation = 0 } = this.monitor.health;
    const isNewer = photos != null && (generation ?? 0) >= (this.#gallery?.generation ?? 0);
    return folder?.count ?? (isNewer ? photos : this.#gallery?.count) ?? Infinity;
  }

  #update() {
    const isEmpty = this.grid.hits.length === 0;
    const message = this.#statusMessage() ?? this.#message(isEmpty);
    this.#region.classList.toggle("has-hits", !isEmpty);
    showMessage(message);
    byId("welcome", HTMLElement).hidden = message !== null || this.#query.kind !== "recent";
  }

  #statusMessage() {
    const { status, health } = this.monitor;
    return statusMessage(status, health, this.#gallery?.command ?? loadCommand());
  }

  /** @param {boolean} isEmpty */
  #message(isEmpty) {
    if (this.#error?.code === "no_photo") return PHOTO_NOT_FOUND;
    if (this.#error !== null) return errorMessage(this.#error.message, this.#error.next, true);
    if (this.#gallery?.count === 0) {
      return this.monitor.health.is_indexing ? FIRST_PHOTOS : emptyGalleryMessage(this.#gallery.index_command);
    }
    if (!isEmpty || this.#shown === null || this.#region.ariaBusy === "true") return null;
    if (hasDays()) return EMPTY_DAYS;
    return this.#folderSelect.value === "" ? NO_OTHER_PHOTO : EMPTY_FOLDER;
  }
}

/**
 * Shows the switch between galleries, if the server has several.
 * @param {Gallery["galleries"]} galleries
 */
function showGalleries(galleries) {
  const select = byId("gallery", HTMLSelectElement);
  select.hidden = galleries.length < 2;
  select.replaceChildren(...galleries.map(({ name, is_current: isCurrent }) => new Option(name, name, isCurrent, isCurrent)));
  select.onchange = () => {
    // The page of a gallery is at g/NAME/, that of the first one also at the root.
    const root = /\/g\/[^/]+\/$/.test(location.pathname) ? "../../" : "./";
    location.href = `${root}g/${encodeURIComponent(select.value)}/`;
  };
}

/**
 * Returns the heading after the last good match; null if the hits are not rated, or end with a good one.
 * Reranked hits are not in order of their scores, so weak ones can be among the good.
 * @param {QueryResponse["hits"]} hits
 * @param {number} offset the number of hits shown before them
 * @returns {Divider | null}
 */
function dividerOf(hits, offset) {
  const weak = hits.findLastIndex(({ match }) => match === "good") + 1;
  if (hits[weak]?.match !== "weak") return null;
  const index = offset + weak;
  return { index, text: index === 0 ? "No close match. Best guesses:" : "Weaker matches" };
}

/** @param {number} tookMs of the last search */
function showDuration(tookMs) {
  byId("info-duration", HTMLElement).textContent = `${Math.max(1, Math.round(tookMs))} ms`;
}

/** Returns whether new photos would not move what the user looks at. */
function isAtTop() {
  return window.scrollY < 80 && document.querySelector("dialog[open]") === null;
}

/** @param {number} ms */
function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
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
