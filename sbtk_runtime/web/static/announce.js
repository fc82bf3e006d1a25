// Sentences for screen readers, and short ones that everybody sees.

const SETTLED_MS = 700;
const SHOWN_MS = 3500;

/** @type {number | undefined} */
let settling;
/** @type {number | undefined} */
let showing;

/**
 * Has a screen reader say something, without a picture of it.
 * @param {string} text
 */
export function announce(text) {
  clearTimeout(settling);
  element("spoken").textContent = text;
}

/**
 * The same for what changes often: only the last of several sentences is said.
 * @param {string} text
 */
export function announceSoon(text) {
  clearTimeout(settling);
  settling = setTimeout(() => announce(text), SETTLED_MS);
}

/**
 * Shows a sentence for a moment; screen readers say it too.
 * @param {string} text
 */
export function say(text) {
  const toast = element("toast");
  toast.textContent = text;
  toast.classList.add("is-shown");
  clearTimeout(showing);
  showing = setTimeout(() => toast.classList.remove("is-shown"), SHOWN_MS);
}

/** @param {string} id */
function element(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no #${id}`);
  return found;
}
