// Where on the page somebody is, kept in the address: Back closes a photo and leaves "more like this".
// "#like=17" shows photos like photo 17, "#photo=3" photo 3 large, "#like=17&photo=3" both.

/** @typedef {{ like: number | null, photo: number | null }} Place */

/** @type {EventTarget} dispatches "change" after every move */
export const moves = new EventTarget();

/** @returns {Place} */
export function here() {
  const parts = new URLSearchParams(location.hash.slice(1));
  return { like: idFrom(parts.get("like")), photo: idFrom(parts.get("photo")) };
}

/**
 * The address of a place, for links.
 * @param {Partial<Place>} place what is left out stays as it is
 * @returns {string}
 */
export function hrefOf(place) {
  const { like, photo } = { ...here(), ...place };
  const parts = [like !== null && `like=${like}`, photo !== null && `photo=${photo}`];
  return `#${parts.filter(Boolean).join("&")}`;
}

/**
 * Goes to a place, so that Back returns.
 * @param {Partial<Place>} place
 */
export function go(place) {
  const href = hrefOf(place);
  if (href === hrefOf({})) return;
  history.pushState({ isStep: true }, "", addressOf(href));
  moves.dispatchEvent(new Event("change"));
}

/**
 * Goes to a place instead of this one: Back returns to the one before.
 * @param {Partial<Place>} place
 */
export function swap(place) {
  history.replaceState(history.state, "", addressOf(hrefOf(place)));
  moves.dispatchEvent(new Event("change"));
}

/** Closes the photo: by going back where it was opened from here. */
export function closePhoto() {
  if (history.state?.isStep) history.back();
  else swap({ photo: null });
}

window.addEventListener("popstate", () => moves.dispatchEvent(new Event("change")));

/** @param {string} href */
function addressOf(href) {
  return href === "#" ? location.pathname + location.search : href;
}

/** @param {string | null} text */
function idFrom(text) {
  return text !== null && /^\d{1,15}$/.test(text) ? Number(text) : null;
}
