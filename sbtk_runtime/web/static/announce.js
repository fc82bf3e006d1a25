// Sentences for screen readers, and short ones that everybody sees.

import { byId } from "./page.js";

const SETTLED_MS = 700;
const SHOWN_MS = 3500;

/** @type {number | undefined} */
let settling;
/** @type {number | undefined} */
let hiding;
/** @type {Element | null} */
let shown = null;

/**
 * Has a screen reader say something, without a picture of it.
 * @param {string} text
 */
export function announce(text) {
  clearTimeout(settling);
  const spoken = byId("spoken", HTMLElement);
  // What is said twice, as "Undone.", is heard twice only if it is another text.
  spoken.textContent = spoken.textContent === text ? `${text}\u00a0` : text;
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
  hide();
  // Nobody sees or hears what lies below an open dialog.
  shown = document.querySelector("dialog[open] .toast") ?? byId("toast", HTMLElement);
  shown.textContent = text;
  shown.classList.add("is-shown");
  hiding = setTimeout(hide, SHOWN_MS);
}

function hide() {
  clearTimeout(hiding);
  shown?.classList.remove("is-shown");
}
