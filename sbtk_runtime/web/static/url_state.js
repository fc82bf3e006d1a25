// The state of the page in the fragment of its URL, so that Back closes a photo or leaves "More like this".
// "#like=17" shows photos similar to photo 17, "#like=17,4&unlike=9" those like 17 and 4 but unlike 9, and
// "#photo=3" enlarges photo 3. "#like=17&region=0.1,0.2,0.4,0.4" shows photos like that part of photo 17.
// "#trace=cat" puts an example under the pen when the page opens.

import { idOf } from "./api.js";

/** @typedef {import("./region_frame.js").Region} Region */
/** @typedef {{ likes: number[], unlikes: number[], photo: number | null, region: Region | null }} UrlState */

const MAX_IDS = 16;

/** Dispatches "change" after every navigation. */
export const urlState = new EventTarget();

/** @returns {UrlState} */
export function currentState() {
  const parts = new URLSearchParams(location.hash.slice(1));
  return { likes: parseIds(parts.get("like")), unlikes: parseIds(parts.get("unlike")), photo: parseId(parts.get("photo")), region: parseRegion(parts.get("region")) };
}

/**
 * Returns the link to a state.
 * @param {Partial<UrlState>} change parts that are left out stay as they are
 * @returns {string}
 */
export function hrefFor(change) {
  const { likes, unlikes, photo, region } = { ...currentState(), ...change };
  const parts = [
    likes.length > 0 && `like=${likes.join(",")}`,
    unlikes.length > 0 && `unlike=${unlikes.join(",")}`,
    region !== null && likes.length === 1 && unlikes.length === 0 && `region=${regionText(region)}`,
    photo !== null && `photo=${photo}`,
  ];
  return `#${parts.filter(Boolean).join("&")}`;
}

/**
 * Changes the state and adds a history entry.
 * @param {Partial<UrlState>} change
 */
export function pushState(change) {
  const href = hrefFor(change);
  if (href === hrefFor({})) return;
  history.pushState({ isPushed: true }, "", urlFor(href));
  urlState.dispatchEvent(new Event("change"));
}

/**
 * Changes the state within the current history entry.
 * @param {Partial<UrlState>} change
 */
export function replaceState(change) {
  history.replaceState(history.state, "", urlFor(hrefFor(change)));
  urlState.dispatchEvent(new Event("change"));
}

/**
 * Returns the name of the example to draw over, and removes it from the URL.
 * @returns {string | null}
 */
export function takeTraced() {
  const name = new URLSearchParams(location.hash.slice(1)).get("trace");
  if (name !== null) replaceState({});
  return name;
}

/** Closes the photo: goes back if it was opened on this page. */
export function closePhoto() {
  if (history.state?.isPushed) history.back();
  else replaceState({ photo: null });
}

window.addEventListener("popstate", () => urlState.dispatchEvent(new Event("change")));

/** @param {string} href */
function urlFor(href) {
  return href === "#" ? location.pathname + location.search : href;
}

/**
 * Adds a photo to those that are liked, or to those that are not; the newest ones count.
 * @param {number} id
 * @param {boolean} isLiked
 */
export function pushFeedback(id, isLiked) {
  const { likes, unlikes } = currentState();
  const [others, opposite] = (isLiked ? [likes, unlikes] : [unlikes, likes]).map((ids) => ids.filter((other) => other !== id));
  const added = [...others, id].slice(-MAX_IDS);
  pushState({ likes: isLiked ? added : opposite, unlikes: isLiked ? opposite : added, photo: null, region: null });
}

/**
 * Removes a photo from the feedback.
 * @param {number} id
 */
export function removeFeedback(id) {
  const { likes, unlikes } = currentState();
  pushState({ likes: likes.filter((other) => other !== id), unlikes: unlikes.filter((other) => other !== id) });
}

/** @param {string | null} text */
function parseIds(text) {
  const ids = (text ?? "").split(",").map(parseId);
  return [...new Set(ids.filter((id) => id !== null))].slice(0, MAX_IDS);
}

/**
 * Returns a region as the API takes it.
 * @param {Region} region
 */
export function regionText(region) {
  return region.map((share) => share.toFixed(4)).join(",");
}

/** @param {string | null} text @returns {Region | null} */
function parseRegion(text) {
  const [x, y, width, height, ...others] = (text ?? "").split(",").map(Number);
  const isWithin = x >= 0 && y >= 0 && width > 0 && height > 0 && x + width <= 1.001 && y + height <= 1.001;
  return isWithin && others.length === 0 ? [x, y, width, height] : null;
}

/** @param {string | null} text */
function parseId(text) {
  return text !== null && /^\d{1,19}$/.test(text) ? idOf(text) : null;
}
