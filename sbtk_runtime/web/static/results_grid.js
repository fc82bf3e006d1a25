// The results as a grid of cards. A photo keeps its card from one response to the next, so that the grid does
// not flicker while the user draws.

import { displayName, displayPath } from "./paths.js";
import { cancelLoading, loadThumbnail, scheduleSharpening } from "./thumbnails.js";
import { hrefFor } from "./url_state.js";

/** @typedef {import("./api.js").Hit} Hit */
/** @typedef {{ item: HTMLLIElement, link: HTMLAnchorElement, image: HTMLImageElement, hit: Hit }} Card */

const HIGH_PRIORITY_CARDS = 6;
const MAX_CACHED_CARDS = 400;
const MOVE_MS = 220;
/** The drag-and-drop type of a card: the id of its photo. */
export const PHOTO_TYPE = "application/x-sbtk-photo";

/** Dispatches "open" and "like" (detail: the photo's id) when the user opens a card or asks for similar photos. */
export class ResultsGrid extends EventTarget {
  /** @type {Map<number, Card>} by photo id, least recently shown first */
  #cards = new Map();
  /** @type {Hit[]} */
  hits = [];

  /** @param {HTMLOListElement} list */
  constructor(list) {
    super();
    this.list = list;
    list.addEventListener("click", (event) => this.#handleClick(event));
    list.addEventListener("keydown", (event) => this.#handleKey(event));
    list.addEventListener("dragstart", (event) => {
      const id = photoIdAt(event.target);
      if (id !== null) event.dataTransfer?.setData(PHOTO_TYPE, `${id}`);
    });
    window.addEventListener("scroll", () => this.#sharpen(), { passive: true });
    window.addEventListener("resize", () => this.#sharpen());
  }

  /**
   * Replaces the hits.
   * @param {readonly Hit[]} hits
   */
  show(hits) {
    this.hits = [...hits];
    const focused = document.activeElement;
    const hadFocus = this.list.contains(focused);
    animateMoves(/** @type {HTMLElement[]} */ ([...this.list.children]), () => {
      const items = hits.map((hit, index) => this.#card(hit, index < HIGH_PRIORITY_CARDS).item);
      const kept = new Set(items);
      for (const old of [...this.list.children]) {
        if (!kept.has(/** @type {HTMLLIElement} */ (old))) old.remove();
      }
      items.forEach((item, index) => {
        if (this.list.children[index] !== item) this.list.insertBefore(item, this.list.children[index] ?? null);
      });
    });
    if (hadFocus) this.#restoreFocus(focused);
    this.#evict();
    this.#sharpen();
  }

  /**
   * Appends the hits that are not shown yet; returns how many.
   * @param {readonly Hit[]} hits
   * @returns {number}
   */
  append(hits) {
    const shown = new Set(this.hits.map((hit) => hit.id));
    const added = hits.filter((hit) => !shown.has(hit.id));
    for (const hit of added) {
      const ranked = { ...hit, rank: this.hits.length + 1 };
      this.hits.push(ranked);
      this.list.append(this.#card(ranked, false).item);
    }
    this.#sharpen();
    return added.length;
  }

  clear() {
    this.show([]);
  }

  /** Loads thumbnails again that failed. */
  retryFailed() {
    for (const [id, card] of this.#cards) {
      if (!card.item.classList.contains("is-failed")) continue;
      card.item.classList.remove("is-failed");
      delete card.image.dataset.px;
      if (card.item.isConnected) loadThumbnail(card.image, id, false);
    }
  }

  /** @param {number} id */
  focus(id) {
    this.#cards.get(id)?.link.focus();
  }

  /** @param {number} id @returns {string | null} the URL of the loaded thumbnail, if any */
  thumbnailOf(id) {
    const image = this.#cards.get(id)?.image;
    return image !== undefined && image.complete && image.naturalWidth > 0 ? image.src : null;
  }

  #sharpen() {
    scheduleSharpening(() =>
      this.hits.flatMap(({ id }) => {
        const card = this.#cards.get(id);
        return card === undefined ? [] : [{ image: card.image, id }];
      }),
    );
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
  #card(hit, isHighPriority) {
    const card = this.#cards.get(hit.id) ?? createCard(hit);
    this.#cards.delete(hit.id);
    this.#cards.set(hit.id, card);
    card.hit = hit;
    updateCard(card);
    loadThumbnail(card.image, hit.id, isHighPriority);
    return card;
  }

  /** Cancels thumbnails of cards that are no longer shown, and removes the oldest of these cards. */
  #evict() {
    for (const [id, card] of this.#cards) {
      if (card.item.isConnected) continue;
      cancelLoading(card.image);
      if (this.#cards.size > MAX_CACHED_CARDS) this.#cards.delete(id);
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
    const links = [...this.list.querySelectorAll("a")];
    const index = links.findIndex((link) => link === document.activeElement);
    if (index < 0) return;
    const columns = columnCount(/** @type {HTMLElement[]} */ ([...this.list.children]));
    /** @type {Record<string, number>} */
    const targets = {
      ArrowLeft: index - 1,
      ArrowRight: index + 1,
      ArrowUp: index - columns,
      ArrowDown: index + columns,
      Home: 0,
      End: links.length - 1,
    };
    const target = targets[event.key];
    if (target === undefined) return;
    event.preventDefault();
    links[target]?.focus();
  }
}

/**
 * Returns the id of the photo whose card contains an element.
 * @param {EventTarget | null} target
 * @returns {number | null}
 */
export function photoIdAt(target) {
  const item = target instanceof Element ? target.closest("li.card") : null;
  return item instanceof HTMLElement && item.dataset.id !== undefined ? Number(item.dataset.id) : null;
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
 * @param {Hit} hit
 * @returns {Card}
 */
function createCard(hit) {
  const template = document.getElementById("card");
  if (!(template instanceof HTMLTemplateElement)) throw new Error("internal error: no card template in the page");
  const item = /** @type {HTMLLIElement} */ (document.importNode(template.content, true).firstElementChild);
  const link = /** @type {HTMLAnchorElement} */ (item.querySelector("a"));
  const image = /** @type {HTMLImageElement} */ (item.querySelector("img"));
  item.dataset.id = `${hit.id}`;
  image.addEventListener("load", () => {
    item.classList.remove("is-failed");
    item.classList.add("is-loaded");
  });
  image.addEventListener("error", () => {
    if (image.hasAttribute("src")) item.classList.add("is-failed");
  });
  return { item, link, image, hit };
}

/** @param {Card} card */
function updateCard({ item, link, hit }) {
  const name = displayName(hit);
  const score = scoreText(hit.score);
  link.href = hrefFor({ photo: hit.id });
  const copies = copiesText(hit);
  link.setAttribute("aria-label", `${name}, result ${hit.rank}, score ${score}${copies && `, ${copies}`}`);
  const badge = link.querySelector(".card-copies");
  if (badge instanceof HTMLElement) {
    badge.textContent = copies;
    badge.hidden = copies === "";
  }
  link.title = displayPath(hit);
  item.style.setProperty("--share", `${Math.min(1, Math.max(0, hit.score))}`);
  const texts = { ".card-rank": `${hit.rank}`, ".card-name": name, ".card-score": score };
  for (const [selector, text] of Object.entries(texts)) {
    const element = item.querySelector(selector);
    if (element !== null && element.textContent !== text) element.textContent = text;
  }
  item.querySelector(".card-like")?.setAttribute("aria-label", `More like ${name}`);
}

/** @param {HTMLElement[]} items, some of which may be animated */
function columnCount(items) {
  const next = items.findIndex((item) => item.offsetTop > items[0].offsetTop);
  return next < 0 ? items.length : next;
}

/**
 * Runs `change` and animates visible elements from their old positions to the new ones, unless the user
 * prefers reduced motion.
 * @param {readonly HTMLElement[]} elements
 * @param {() => void} change
 */
function animateMoves(elements, change) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
    change();
    return;
  }
  const before = elements.map((element) => element.getBoundingClientRect());
  change();
  const after = elements.map((element) => element.getBoundingClientRect());
  elements.forEach((element, index) => {
    const [from, to] = [before[index], after[index]];
    const [dx, dy] = [from.left - to.left, from.top - to.top];
    const isVisible = to.top < window.innerHeight && from.top < window.innerHeight && to.bottom > 0;
    if (!isVisible || !element.isConnected || (dx === 0 && dy === 0)) return;
    element.animate([{ transform: `translate(${dx}px, ${dy}px)` }, { transform: "none" }], {
      duration: MOVE_MS,
      easing: "cubic-bezier(0.2, 0, 0, 1)",
    });
  });
}
