// The state of the page in the fragment of its URL, so that Back closes a photo or leaves "More like this".
// "#like=17" shows photos similar to photo 17, "#photo=3" enlarges photo 3, "#like=17&photo=3" does both.

/** @typedef {{ like: number | null, photo: number | null }} UrlState */

/** Dispatches "change" after every navigation. */
export const urlState = new EventTarget();

/** @returns {UrlState} */
export function currentState() {
  const parts = new URLSearchParams(location.hash.slice(1));
  return { like: parseId(parts.get("like")), photo: parseId(parts.get("photo")) };
}

/**
 * Returns the link to a state.
 * @param {Partial<UrlState>} change parts that are left out stay as they are
 * @returns {string}
 */
export function hrefFor(change) {
  const { like, photo } = { ...currentState(), ...change };
  const parts = [like !== null && `like=${like}`, photo !== null && `photo=${photo}`];
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

/** @param {string | null} text */
function parseId(text) {
  return text !== null && /^\d{1,15}$/.test(text) ? Number(text) : null;
}
