// The state of the page in the fragment of its URL, so that Back closes a photo or leaves "More like this".
// "#like=17" shows photos similar to photo 17, "#like=17,4&unlike=9" those like 17 and 4 but unlike 9, and
// "#photo=3" enlarges photo 3.

/** @typedef {{ likes: number[], unlikes: number[], photo: number | null }} UrlState */

const MAX_IDS = 16;

/** Dispatches "change" after every navigation. */
export const urlState = new EventTarget();

/** @returns {UrlState} */
export function currentState() {
  const parts = new URLSearchParams(location.hash.slice(1));
  return { likes: parseIds(parts.get("like")), unlikes: parseIds(parts.get("unlike")), photo: parseId(parts.get("photo")) };
}

/**
 * Returns the link to a state.
 * @param {Partial<UrlState>} change parts that are left out stay as they are
 * @returns {string}
 */
export function hrefFor(change) {
  const { likes, unlikes, photo } = { ...currentState(), ...change };
  const parts = [
    likes.length > 0 && `like=${likes.join(",")}`,
    unlikes.length > 0 && `unlike=${unlikes.join(",")}`,
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
  pushState({ likes: isLiked ? added : opposite, unlikes: isLiked ? opposite : added, photo: null });
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

/** @param {string | null} text */
function parseId(text) {
  return text !== null && /^\d{1,15}$/.test(text) ? Number(text) : null;
}
