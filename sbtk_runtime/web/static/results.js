// Hits as a grid of cards. A photo keeps its card from one answer to the next, so that nothing
// flickers while somebody draws.

import { glide } from "./motion.js";
import { nameOf, pathOf } from "./names.js";
import { hrefOf } from "./place.js";
import { drop, sharpenSoon, showSmall } from "./thumbnails.js";

/** @typedef {import("./api.js").Hit} Hit */
/** @typedef {{ item: HTMLLIElement, link: HTMLAnchorElement, image: HTMLImageElement, hit: Hit }} Card */

const URGENT = 6;
const KEPT = 400;
/** What a dragged card carries: the id of its photo. */
export const PHOTO_TYPE = "application/x-sbtk-photo";

/**
 * Dispatches "open" and "like" (detail: the id) when a card is asked for them.
 */
export class Results extends EventTarget {
  /** @type {Map<number, Card>} of all photos seen, the latest last */
  #cards = new Map();
  /** @type {Hit[]} */
  hits = [];

  /** @param {HTMLOListElement} list */
  constructor(list) {
    super();
    this.list = list;
    list.addEventListener("click", (event) => this.#clicked(event));
    list.addEventListener("dragstart", (event) => {
      const id = idOf(event.target);
      if (id !== null) event.dataTransfer?.setData(PHOTO_TYPE, `${id}`);
    });
    window.addEventListener("scroll", () => this.sharpen(), { passive: true });
    window.addEventListener("resize", () => this.sharpen());
  }

  /**
   * Shows hits instead of those shown before.
   * @param {readonly Hit[]} hits
   */
  show(hits) {
    this.hits = [...hits];
    const focused = document.activeElement;
    const hadFocus = this.list.contains(focused);
    glide([...this.list.children].filter(isItem), () => {
      const items = hits.map((hit, index) => this.#card(hit, index < URGENT).item);
      const kept = new Set(items);
      for (const old of [...this.list.children]) {
        if (!kept.has(/** @type {HTMLLIElement} */ (old))) old.remove();
      }
      items.forEach((item, index) => {
        if (this.list.children[index] !== item) this.list.insertBefore(item, this.list.children[index] ?? null);
      });
    });
    if (hadFocus) this.#focusAgain(focused);
    this.#forget();
    this.sharpen();
  }

  /**
   * Adds those hits that are not shown yet; returns how many.
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
    this.sharpen();
    return added.length;
  }

  clear() {
    this.show([]);
  }

  /** Asks again for thumbnails that did not come. */
  retry() {
    for (const [id, card] of this.#cards) {
      if (!card.item.classList.contains("is-gone")) continue;
      card.item.classList.remove("is-gone");
      delete card.image.dataset.px;
      if (card.item.isConnected) showSmall(card.image, id, false);
    }
  }

  sharpen() {
    sharpenSoon(() => this.hits.map(({ id }) => ({ image: this.#known(id).image, id })));
  }

  /** @param {number} id */
  focus(id) {
    this.#cards.get(id)?.link.focus();
  }

  /**
   * What is moved loses the focus; that of a photo which is no longer there goes to the closest one.
   * @param {Element | null} focused
   */
  #focusAgain(focused) {
    const next = this.list.contains(focused) ? focused : this.list.querySelector("a");
    const place = next ?? this.list.closest("section");
    if (place instanceof HTMLElement) place.focus({ preventScroll: true });
  }

  /** @param {number} id @returns {string | null} the address of the thumbnail that is shown */
  thumbnailOf(id) {
    const image = this.#cards.get(id)?.image;
    return image !== undefined && image.complete && image.naturalWidth > 0 ? image.src : null;
  }

  /**
   * @param {Hit} hit
   * @param {boolean} isUrgent
   * @returns {Card}
   */
  #card(hit, isUrgent) {
    const card = this.#cards.get(hit.id) ?? newCard(hit);
    this.#cards.delete(hit.id);
    this.#cards.set(hit.id, card);
    card.hit = hit;
    describe(card);
    showSmall(card.image, hit.id, isUrgent);
    return card;
  }

  /** @param {number} id @returns {Card} */
  #known(id) {
    const card = this.#cards.get(id);
    if (card === undefined) throw new Error(`photo ${id} has no card`);
    return card;
  }

  /** Cards of photos that were shown a while ago go; pictures nobody sees are not loaded. */
  #forget() {
    for (const [id, card] of this.#cards) {
      if (card.item.isConnected) continue;
      drop(card.image);
      if (this.#cards.size > KEPT) this.#cards.delete(id);
    }
  }

  /** @param {MouseEvent} event */
  #clicked(event) {
    const id = idOf(event.target);
    if (id === null || event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
    if (!(event.target instanceof Element) || event.target.closest("a, button") === null) return;
    event.preventDefault();
    const name = event.target.closest("button") === null ? "open" : "like";
    this.dispatchEvent(new CustomEvent(name, { detail: id }));
  }
}

/**
 * The id of the photo whose card an element is in.
 * @param {EventTarget | null} target
 * @returns {number | null}
 */
export function idOf(target) {
  const item = target instanceof Element ? target.closest("li.card") : null;
  return item instanceof HTMLElement && item.dataset.id !== undefined ? Number(item.dataset.id) : null;
}

/**
 * @param {Hit} hit
 * @returns {Card}
 */
function newCard(hit) {
  const template = document.getElementById("card");
  if (!(template instanceof HTMLTemplateElement)) throw new Error("the page has no card");
  const item = /** @type {HTMLLIElement} */ (document.importNode(template.content, true).firstElementChild);
  const link = /** @type {HTMLAnchorElement} */ (item.querySelector("a"));
  const image = /** @type {HTMLImageElement} */ (item.querySelector("img"));
  item.dataset.id = `${hit.id}`;
  image.addEventListener("load", () => {
    item.classList.remove("is-gone");
    item.classList.add("is-here");
  });
  image.addEventListener("error", () => {
    if (image.hasAttribute("src")) item.classList.add("is-gone");
  });
  return { item, link, image, hit };
}

/** @param {Card} card */
function describe({ item, link, hit }) {
  const name = nameOf(hit);
  const score = scoreText(hit.score);
  link.href = hrefOf({ photo: hit.id });
  const copies = copiesText(hit);
  link.setAttribute("aria-label", `${name}, number ${hit.rank}, score ${score}${copies && `, ${copies}`}`);
  const badge = link.querySelector(".card-copies");
  if (badge instanceof HTMLElement) {
    badge.textContent = copies;
    badge.hidden = copies === "";
  }
  link.title = pathOf(hit);
  item.style.setProperty("--share", `${Math.min(1, Math.max(0, hit.score))}`);
  const texts = { ".card-rank": `${hit.rank}`, ".card-name": name, ".card-score": score };
  for (const [place, text] of Object.entries(texts)) {
    const element = item.querySelector(place);
    if (element !== null && element.textContent !== text) element.textContent = text;
  }
  item.querySelector(".card-like")?.setAttribute("aria-label", `More like ${name}`);
}

/**
 * How many other photos of the same bytes a hit stands for; empty for none.
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
 * @param {Element} element
 * @returns {element is HTMLElement}
 */
function isItem(element) {
  return element instanceof HTMLElement;
}
