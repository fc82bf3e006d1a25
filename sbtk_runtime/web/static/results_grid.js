// The photos in justified rows: every photo keeps its aspect ratio, and every row fills the width. Only rows near
// the viewport are in the document, so that galleries of any size can be scrolled to the end.

import { idOf } from "./api.js";
import { displayName, displayPath } from "./paths.js";
import { cancelLoading, loadThumbnail, scheduleSharpening } from "./thumbnails.js";
import { hrefFor } from "./url_state.js";

/** @typedef {import("./api.js").Hit} Hit */
/** @typedef {{ left: number, top: number, width: number, height: number }} Box */
/** @typedef {{ item: HTMLLIElement, link: HTMLAnchorElement, image: HTMLImageElement, box: Box | null }} Card */
/** @typedef {{ start: number, end: number, top: number, height: number }} Row hits `start` to `end` (excluded) */
/** @typedef {{ index: number, text: string }} Divider a heading before the hit at `index` */

const GAP_PX = 6;
const DIVIDER_PX = 34;
const DEFAULT_RATIO = 4 / 3;
// Images beyond these aspect ratios are letterboxed.
const [MIN_RATIO, MAX_RATIO] = [0.4, 4];
const HIGH_PRIORITY_CARDS = 8;
const PREPARED_CARDS = 20;
const PREPARE_TIMEOUT_MS = 400;
const RELAYOUT_MS = 60;
const MAX_CACHED_CARDS = 400;
const MOVE_MS = 220;
/** The drag-and-drop type of a card: the id of its photo. */
export const PHOTO_TYPE = "application/x-sbtk-photo";

/** Dispatches "open" and "like" (detail: the photo's id) when the user opens a card or asks for similar photos. */
export class ResultsGrid extends EventTarget {
  /** @type {Hit[]} */
  hits = [];
  /** @type {Map<number, Card>} by photo id, least recently used first */
  #cards = new Map();
  /** @type {Card[]} cards of photos that were scrolled past, for reuse */
  #spareCards = [];
  /** @type {Map<number, number>} width / height by photo id */
  #ratios = new Map();
  /** @type {Map<number, number>} positions in `hits` by photo id */
  #positions = new Map();
  /** @type {Row[]} */
  #rows = [];
  /** @type {Divider | null} */
  #divider = null;
  #dividerItem = document.createElement("li");
  #width = 0;
  /** @type {number | undefined} */
  #relayoutTimer;

  /** @param {HTMLOListElement} list */
  constructor(list) {
    super();
    this.list = list;
    this.#dividerItem.className = "divider";
    list.addEventListener("click", (event) => this.#handleClick(event));
    list.addEventListener("keydown", (event) => this.#handleKey(event));
    list.addEventListener("dragstart", (event) => {
      const id = photoIdAt(event.target);
      if (id !== null) event.dataTransfer?.setData(PHOTO_TYPE, `${id}`);
    });
    window.addEventListener("scroll", () => this.#render(), { passive: true });
    window.addEventListener("resize", () => this.#render());
    new ResizeObserver(() => {
      if (list.clientWidth !== this.#width) this.#relayout();
    }).observe(list);
  }

  /**
   * Loads the first thumbnails of hits, so that their aspect ratios are known when the hits are shown.
   * @param {readonly Hit[]} hits
   * @returns {Promise<unknown>} resolves when they are loaded, or after a timeout
   */
  prepare(hits) {
    const unknown = hits.slice(0, PREPARED_CARDS).filter(({ id }) => !this.#ratios.has(id));
    if (unknown.length === 0) return Promise.resolve();
    const loaded = unknown.map((hit, index) => {
      const { image } = this.#card(hit, index < HIGH_PRIORITY_CARDS);
      return new Promise((resolve) => {
        image.addEventListener("load", resolve, { once: true });
        image.addEventListener("error", resolve, { once: true });
        if (this.#ratios.has(hit.id)) resolve(null);
      });
    });
    return Promise.race([Promise.all(loaded), new Promise((resolve) => setTimeout(resolve, PREPARE_TIMEOUT_MS))]);
  }

  /**
   * Replaces the hits.
   * @param {readonly Hit[]} hits
   * @param {Divider | null} [divider]
   */
  show(hits, divider = null) {
    const focused = document.activeElement;
    const hadFocus = this.list.contains(focused);
    const before = new Map([...this.#cards].map(([id, { item, box }]) => [id, item.isConnected ? box : null]));
    this.hits = [];
    this.#positions.clear();
    this.#add(hits);
    this.#divider = divider;
    this.#layout();
    this.#render();
    if (hadFocus) this.#restoreFocus(focused);
    this.#animate(before);
    this.#evict();
  }

  /**
   * Appends the hits that are not shown yet; returns how many.
   * @param {readonly Hit[]} hits
   * @param {Divider | null} [divider]
   * @returns {number}
   */
  append(hits, divider = null) {
    const added = hits.filter(({ id }) => !this.#positions.has(id));
    this.#add(added);
    this.#divider ??= divider;
    this.#layout();
    this.#render();
    return added.length;
  }

  clear() {
    this.show([]);
  }

  /** Loads thumbnails again that failed. */
  retryFailed() {
    for (const [id, { item, image }] of this.#cards) {
      if (!item.classList.contains("is-failed")) continue;
      item.classList.remove("is-failed");
      delete image.dataset.px;
      if (item.isConnected) loadThumbnail(image, id, false);
    }
  }

  /**
   * Focuses the card of a photo and scrolls to it.
   * @param {number} id
   */
  focus(id) {
    const position = this.#positions.get(id);
    if (position === undefined) return;
    this.#scrollTo(position);
    this.#cards.get(id)?.link.focus({ preventScroll: true });
  }

  /** Focuses the first card; returns false if there is none. */
  focusFirst() {
    if (this.hits.length > 0) this.focus(this.hits[0].id);
    return this.hits.length > 0;
  }

  /** @param {number} id @returns {number} the position of a photo in `hits`, or -1 */
  positionOf(id) {
    return this.#positions.get(id) ?? -1;
  }

  /** @param {number} id @returns {string | null} the URL of the loaded thumbnail, if any */
  thumbnailOf(id) {
    const image = this.#cards.get(id)?.image;
    return image !== undefined && image.complete && image.naturalWidth > 0 ? image.src : null;
  }

  /** @param {readonly Hit[]} hits */
  #add(hits) {
    for (const hit of hits) {
      this.#positions.set(hit.id, this.hits.length);
      this.hits.push(hit);
    }
  }

  /** Divides the hits into rows. */
  #layout() {
    const width = (this.#width = this.list.clientWidth);
    const target = targetHeight(width);
    const divider = this.#divider?.index ?? -1;
    this.#rows = [];
    let top = 0;
    for (let start = 0; start < this.hits.length; ) {
      if (start === divider) top += DIVIDER_PX + GAP_PX;
      const limit = start < divider ? divider : this.hits.length;
      const { end, height } = this.#nextRow(start, limit, width, target);
      this.#rows.push({ start, end, top, height });
      top += height + GAP_PX;
      start = end;
    }
    this.list.style.height = `${Math.max(0, top - GAP_PX)}px`;
  }

  /**
   * Returns the row from `start` whose height is closest to the target.
   * @param {number} start
   * @param {number} limit
   * @param {number} width
   * @param {number} target
   * @returns {{ end: number, height: number }}
   */
  #nextRow(start, limit, width, target) {
    let ratios = 0;
    let previous = Infinity;
    for (let end = start + 1; end <= limit; end += 1) {
      ratios += this.#ratioAt(end - 1);
      const height = (width - GAP_PX * (end - start - 1)) / ratios;
      if (height <= target) {
        const isPreviousCloser = end > start + 1 && previous / target < target / height;
        return isPreviousCloser ? { end: end - 1, height: previous } : { end, height };
      }
      previous = height;
    }
    return { end: limit, height: Math.min(previous, target) };
  }

  /** @param {number} position */
  #ratioAt(position) {
    return this.#ratios.get(this.hits[position].id) ?? DEFAULT_RATIO;
  }

  /**
   * @param {Row} row
   * @returns {Box[]}
   */
  #boxes({ start, end, top, height }) {
    /** @type {Box[]} */
    const boxes = [];
    let left = 0;
    for (let position = start; position < end; position += 1) {
      const width = this.#ratioAt(position) * height;
      boxes.push({ left, top, width, height });
      left += width + GAP_PX;
    }
    return boxes;
  }

  /** Puts the rows near the viewport into the document, and removes the others. */
  #render() {
    const offset = this.list.getBoundingClientRect().top;
    const margin = window.innerHeight;
    const first = this.#rowAt(-offset - margin);
    const last = this.#rowAt(-offset + window.innerHeight + margin);
    /** @type {Set<Element>} */
    const kept = new Set();
    /** @type {HTMLLIElement[]} */
    const items = [];
    const focusedId = photoIdAt(document.activeElement);
    const focused = focusedId === null ? -1 : this.positionOf(focusedId);
    this.#rows.forEach((row, index) => {
      const hasFocus = row.start <= focused && focused < row.end;
      if ((index < first || index > last) && !hasFocus) return;
      if (row.start === this.#divider?.index) items.push(this.#placeDivider(row.top));
      const boxes = this.#boxes(row);
      for (let position = row.start; position < row.end; position += 1) {
        const card = this.#card(this.hits[position], position < HIGH_PRIORITY_CARDS);
        this.#place(card, position, boxes[position - row.start]);
        items.push(card.item);
      }
    });
    for (const item of items) kept.add(item);
    for (const item of [...this.list.children]) {
      if (kept.has(item)) continue;
      const id = photoIdAt(item);
      item.remove();
      if (id !== null) this.#cancelLoading(id);
    }
    items.forEach((item, index) => {
      if (this.list.children[index] !== item) this.list.insertBefore(item, this.list.children[index] ?? null);
    });
    this.#evict();
    scheduleSharpening(() =>
      [...this.list.querySelectorAll("img")].map((image) => ({ image, id: photoIdAt(image) ?? 0 })),
    );
  }

  /**
   * Returns the index of the row at a height, or of the closest one.
   * @param {number} y
   */
  #rowAt(y) {
    let [low, high] = [0, this.#rows.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#rows[middle].top + this.#rows[middle].height < y) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /**
   * @param {Card} card
   * @param {number} position
   * @param {Box} box
   */
  #place(card, position, box) {
    const { style } = card.item;
    card.box = box;
    for (const side of /** @type {const} */ (["left", "top", "width", "height"])) style[side] = `${box[side]}px`;
    card.item.setAttribute("aria-posinset", `${position + 1}`);
    card.item.setAttribute("aria-setsize", `${this.hits.length}`);
    updateCard(card, this.hits[position], position);
  }

  /** @param {number} rowTop */
  #placeDivider(rowTop) {
    this.#dividerItem.textContent = this.#divider?.text ?? "";
    this.#dividerItem.style.top = `${rowTop - DIVIDER_PX - GAP_PX}px`;
    return this.#dividerItem;
  }

  /** Lays out again after aspect ratios became known; the first visible photo keeps its place on the screen. */
  #relayout() {
    clearTimeout(this.#relayoutTimer);
    this.#relayoutTimer = undefined;
    const offset = this.list.getBoundingClientRect().top;
    const anchor = offset < 0 ? this.#rows[this.#rowAt(-offset)] : undefined;
    this.#layout();
    const moved = anchor && this.#rowOf(anchor.start);
    if (anchor && moved && moved.top !== anchor.top) window.scrollBy({ top: moved.top - anchor.top, behavior: "instant" });
    this.#render();
  }

  /** @param {number} position @returns {Row | undefined} */
  #rowOf(position) {
    return this.#rows.find(({ start, end }) => start <= position && position < end);
  }

  /** @param {number} position */
  #scrollTo(position) {
    const row = this.#rowOf(position);
    if (row === undefined) return;
    const top = this.list.getBoundingClientRect().top + row.top;
    const isAbove = top < 0;
    if (isAbove || top + row.height > window.innerHeight) {
      const room = isAbove ? 16 : window.innerHeight - row.height - 16;
      window.scrollBy({ top: top - Math.max(16, room), behavior: "instant" });
    }
    this.#render();
  }

  /**
   * Animates cards from their previous boxes, unless the user prefers reduced motion.
   * @param {Map<number, Box | null>} before
   */
  #animate(before) {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    for (const [id, from] of before) {
      const card = this.#cards.get(id);
      if (!from || !card?.box || !card.item.isConnected) continue;
      const { item, box } = card;
      const [dx, dy] = [from.left - box.left, from.top - box.top];
      if (dx === 0 && dy === 0) continue;
      item.animate([{ transform: `translate(${dx}px, ${dy}px)` }, { transform: "none" }], {
        duration: MOVE_MS,
        easing: "cubic-bezier(0.2, 0, 0, 1)",
      });
    }
  }

  /**
   * Focuses an element again that lost the focus by being moved, or the first card if it was removed.
   * @param {Element | null} focused
   */
  #restoreFocus(focused) {
    const next = this.list.contains(focused) ? focused : this.list.querySelector("a");
    const target = next ?? this.list.closest("section");
    if (target instanceof HTMLElement) target.focus({ preventScroll: true });
  }

  /**
   * @param {Hit} hit
   * @param {boolean} isHighPriority
   * @returns {Card}
   */
  #card({ id }, isHighPriority) {
    const card = this.#cards.get(id) ?? this.#spareCards.pop() ?? this.#createCard();
    card.item.dataset.id = `${id}`;
    this.#cards.delete(id);
    this.#cards.set(id, card);
    loadThumbnail(card.image, id, isHighPriority);
    return card;
  }

  /** @returns {Card} */
  #createCard() {
    const template = document.getElementById("card");
    if (!(template instanceof HTMLTemplateElement)) throw new Error("internal error: no card template in the page");
    const item = /** @type {HTMLLIElement} */ (document.importNode(template.content, true).firstElementChild);
    const link = /** @type {HTMLAnchorElement} */ (item.querySelector("a"));
    const image = /** @type {HTMLImageElement} */ (item.querySelector("img"));
    image.addEventListener("load", () => {
      if (!image.hasAttribute("src")) return;
      item.classList.remove("is-failed");
      item.classList.add("is-loaded");
      const ratio = image.naturalWidth / image.naturalHeight;
      this.#setRatio(idOf(item.dataset.id ?? ""), Math.min(MAX_RATIO, Math.max(MIN_RATIO, ratio)));
    });
    image.addEventListener("error", () => {
      if (image.hasAttribute("src")) item.classList.add("is-failed");
    });
    return { item, link, image, box: null };
  }

  /**
   * @param {number} id
   * @param {number} ratio
   */
  #setRatio(id, ratio) {
    // Thumbnails of different sizes differ by rounding.
    if (Math.abs((this.#ratios.get(id) ?? 0) - ratio) < 0.05 * ratio) return;
    this.#ratios.set(id, ratio);
    if (this.#positions.has(id)) this.#relayoutTimer ??= setTimeout(() => this.#relayout(), RELAYOUT_MS);
  }

  /** @param {number} id */
  #cancelLoading(id) {
    const image = this.#cards.get(id)?.image;
    if (image !== undefined) cancelLoading(image);
  }

  /** Frees the least recently used cards that are not shown. */
  #evict() {
    for (const [id, card] of this.#cards) {
      if (this.#cards.size <= MAX_CACHED_CARDS) break;
      if (card.item.isConnected) continue;
      this.#cards.delete(id);
      card.item.className = "photo";
      card.image.removeAttribute("src");
      delete card.image.dataset.px;
      card.box = null;
      this.#spareCards.push(card);
    }
  }

  /** @param {MouseEvent} event */
  #handleClick(event) {
    const id = photoIdAt(event.target);
    if (id === null || event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
    if (!(event.target instanceof Element) || event.target.closest("a, button") === null) return;
    event.preventDefault();
    const name = event.target.closest("button") === null ? "open" : "like";
    this.dispatchEvent(new CustomEvent(name, { detail: id }));
  }

  /**
   * Moves the focus with the arrow keys, Home and End.
   * @param {KeyboardEvent} event
   */
  #handleKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const id = photoIdAt(document.activeElement);
    if (id === null) return;
    const position = this.positionOf(id);
    /** @type {Record<string, number | undefined>} */
    const targets = {
      ArrowLeft: position - 1,
      ArrowRight: position + 1,
      ArrowUp: this.#positionBeside(position, -1),
      ArrowDown: this.#positionBeside(position, 1),
      Home: 0,
      End: this.hits.length - 1,
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    const target = this.hits[targets[event.key] ?? -1];
    if (target !== undefined) this.focus(target.id);
  }

  /**
   * Returns the photo in the next or previous row that is horizontally closest to a photo.
   * @param {number} position
   * @param {1 | -1} direction
   */
  #positionBeside(position, direction) {
    const index = this.#rows.findIndex(({ start, end }) => start <= position && position < end);
    const row = this.#rows[index + direction];
    if (row === undefined) return undefined;
    const box = this.#boxes(this.#rows[index])[position - this.#rows[index].start];
    const distances = this.#boxes(row).map(({ left, width }) => Math.abs(left + width / 2 - box.left - box.width / 2));
    return row.start + distances.indexOf(Math.min(...distances));
  }
}

/**
 * Returns the id of the photo whose card contains an element.
 * @param {EventTarget | null} target
 * @returns {number | null}
 */
export function photoIdAt(target) {
  const item = target instanceof Element ? target.closest("li.photo") : null;
  return item instanceof HTMLElement && item.dataset.id !== undefined ? idOf(item.dataset.id) : null;
}

/**
 * Returns how many identical photos a hit stands for, as text; empty for none.
 * @param {Hit} hit
 * @returns {string}
 */
export function copiesText({ copies }) {
  return copies?.length ? `+${copies.length.toLocaleString("en")} identical` : "";
}

/**
 * @param {number} score
 * @returns {string}
 */
export function scoreText(score) {
  const text = score.toFixed(2);
  return text === "-0.00" ? "0.00" : text.replace("-", "\u2212");
}

/**
 * @param {Card} card
 * @param {Hit} hit
 * @param {number} position
 */
function updateCard({ item, link }, hit, position) {
  const name = displayName(hit);
  const copies = copiesText(hit);
  const score = hit.score === undefined ? "" : scoreText(hit.score);
  link.href = hrefFor({ photo: hit.id });
  link.title = displayPath(hit);
  const label = [name, score && `result ${position + 1}`, score && `score ${score}`, copies];
  link.setAttribute("aria-label", label.filter(Boolean).join(", "));
  const texts = { ".photo-copies": copies, ".photo-name": name, ".photo-score": score };
  for (const [selector, text] of Object.entries(texts)) {
    const element = item.querySelector(selector);
    if (!(element instanceof HTMLElement) || element.textContent === text) continue;
    element.textContent = text;
    element.hidden = text === "";
  }
  item.querySelector(".photo-like")?.setAttribute("aria-label", `More like ${name}`);
}

/** @param {number} width of the grid @returns {number} the height of a row, in pixels */
function targetHeight(width) {
  if (width < 520) return 124;
  return width < 1000 ? 168 : 196;
}
