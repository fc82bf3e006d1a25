// Keyboard shortcuts, and the list of them. Single keys can be switched off: they get in the way of
// who steers a computer by voice.

import { byId } from "./page.js";

/** @typedef {{ keys: string, does: string, run: (event: KeyboardEvent) => void }} Shortcut */

const KEPT_AS = "sbtk-single-keys";
const COMMAND = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";

/**
 * @param {Shortcut[]} shortcuts `keys` as "B", "Ctrl+Z" or "Ctrl+Shift+Z", alternatives by " or "
 * @param {[string, string][]} more what is done by keys elsewhere, for the list only
 */
export function listenForKeys(shortcuts, more) {
  const dialog = byId("help", HTMLDialogElement);
  const single = byId("single-keys", HTMLInputElement);
  single.checked = kept() !== "off";
  single.addEventListener("change", () => keep(single.checked ? "on" : "off"));
  fill(byId("help-keys", HTMLElement), [
    ...shortcuts.map(({ keys, does }) => /** @type {[string, string]} */ ([keys, does])),
    ...more,
  ]);
  byId("help-open", HTMLButtonElement).addEventListener("click", () => dialog.showModal());
  byId("help-close", HTMLButtonElement).addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || isTyping(event.target)) return;
    if (document.querySelector("dialog[open]") !== null) return;
    const pressed = nameOf(event);
    const shortcut = shortcuts.find(({ keys }) => keys.split(" or ").includes(pressed));
    if (shortcut === undefined || (!pressed.startsWith("Ctrl+") && !single.checked)) return;
    event.preventDefault();
    shortcut.run(event);
  });
}

/**
 * @param {KeyboardEvent} event
 * @returns {string} as in the list of shortcuts
 */
function nameOf(event) {
  if (event.altKey) return "";
  const key = event.key.length === 1 ? characterOf(event).toUpperCase() : event.key;
  const isLetter = /^[A-Z]$/.test(key);
  const command = event.ctrlKey || event.metaKey ? "Ctrl+" : "";
  return `${command}${event.shiftKey && (isLetter || key.length > 1) ? "Shift+" : ""}${key}`;
}

/**
 * The character of a key; where letters are not Latin, as on a Greek keyboard, the Latin one there.
 * @param {KeyboardEvent} event
 */
function characterOf({ key, code }) {
  return key > "\x7f" && /^Key[A-Z]$/.test(code) ? code.slice(3) : key;
}

/** @param {EventTarget | null} target */
function isTyping(target) {
  if (!(target instanceof HTMLElement)) return false;
  if (target instanceof HTMLInputElement) return !["radio", "checkbox", "button"].includes(target.type);
  return target.isContentEditable || target.matches("select, textarea");
}

/**
 * @param {HTMLElement} list
 * @param {[string, string][]} rows
 */
function fill(list, rows) {
  for (const [keys, does] of rows) {
    const term = document.createElement("dt");
    keys.split(" or ").forEach((key, index) => {
      if (index > 0) term.append(" or ");
      const shown = document.createElement("kbd");
      shown.textContent = key.replace("Ctrl", COMMAND).replaceAll("+", " + ");
      term.append(shown);
    });
    const description = document.createElement("dd");
    description.textContent = does;
    list.append(term, description);
  }
}

function kept() {
  try {
    return localStorage.getItem(KEPT_AS);
  } catch {
    return null;
  }
}

/** @param {string} value */
function keep(value) {
  try {
    localStorage.setItem(KEPT_AS, value);
  } catch {
    // Then it lasts as long as the page.
  }
}
