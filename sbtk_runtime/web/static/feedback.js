// The photos that the user wants more or less of, as chips above the results.

import { getPhoto, thumbnailUrl } from "./api.js";
import { byId } from "./dom.js";
import { displayName } from "./paths.js";
import { currentState, removeFeedback } from "./url_state.js";

/** @typedef {import("./api.js").Hit} Hit */

/**
 * Shows a chip for each photo, or hides the bar if there is none.
 * @param {readonly number[]} likes
 * @param {readonly number[]} unlikes
 * @param {string} region the part of the only one that is liked, or ""
 * @param {(id: number) => Hit | undefined} findHit returns a photo of the results
 */
export function showFeedback(likes, unlikes, region, findHit) {
  byId("likes-label", HTMLElement).textContent = region === "" ? "Similar to" : "Similar to a part of";
  const bar = byId("similar-bar", HTMLElement);
  const chipButtons = () => /** @type {HTMLElement[]} */ ([...bar.querySelectorAll("li button")]);
  const hadFocus = bar.contains(document.activeElement);
  const place = chipButtons().findIndex((button) => button === document.activeElement);
  bar.hidden = likes.length + unlikes.length === 0;
  byId("similar-close", HTMLElement).hidden = likes.length === 0;
  for (const [name, ids] of /** @type {const} */ ([["likes", likes], ["unlikes", unlikes]])) {
    byId(name, HTMLElement).hidden = ids.length === 0;
    const list = byId(`${name}-list`, HTMLUListElement);
    list.replaceChildren(...ids.map((id) => chipOf(id, findHit(id))));
  }
  const isFocusKept = bar.contains(document.activeElement) && document.activeElement?.checkVisibility();
  if (!hadFocus || isFocusKept) return;
  // Otherwise the next Tab would start at the top of the page.
  const left = chipButtons();
  (left[Math.min(place, left.length - 1)] ?? byId("results", HTMLElement)).focus();
}

/**
 * Returns the hits without those that the user has judged: the chips show them.
 * @param {readonly Hit[]} hits
 * @returns {Hit[]}
 */
export function withoutFeedback(hits) {
  const { likes, unlikes } = currentState();
  const judged = new Set([...likes, ...unlikes]);
  // A judged photo may be in the results as a copy of another one.
  return hits.filter(({ id, copies = [] }) => ![id, ...copies.map((copy) => copy.id)].some((one) => judged.has(one)));
}

/**
 * @param {number} id
 * @param {Hit | undefined} hit
 * @returns {HTMLLIElement}
 */
function chipOf(id, hit) {
  const template = byId("chip", HTMLTemplateElement);
  const item = /** @type {HTMLLIElement} */ (document.importNode(template.content, true).firstElementChild);
  const image = /** @type {HTMLImageElement} */ (item.querySelector("img"));
  const button = /** @type {HTMLButtonElement} */ (item.querySelector("button"));
  const name = /** @type {HTMLElement} */ (item.querySelector("span"));
  image.src = thumbnailUrl(id, 180);
  button.addEventListener("click", () => removeFeedback(id));
  /** @param {string} text */
  const setName = (text) => {
    name.textContent = text;
    button.setAttribute("aria-label", `Remove ${text}`);
  };
  setName(hit ? displayName(hit) : `photo ${id}`);
  if (!hit) getPhoto(id).then((photo) => setName(displayName(photo)), () => undefined); // The search shows the error.
  return item;
}
