// Access to the elements of index.html, status messages, and the clipboard.

const ANNOUNCE_DELAY_MS = 700;
const TOAST_MS = 3500;
// For a message of several sentences: slow readers take this long for a letter.
const TOAST_MS_PER_LETTER = 70;

/** @type {number | undefined} */
let announceTimer;
/** @type {number | undefined} */
let toastTimer;
/** @type {Element | null} */
let toast = null;

/**
 * @template {HTMLElement} T
 * @param {string} id
 * @param {{ new (): T, prototype: T }} type
 * @returns {T}
 */
export function byId(id, type) {
  const element = document.getElementById(id);
  if (!(element instanceof type)) throw new Error(`internal error: no ${type.name} #${id} in the page`);
  return element;
}

/**
 * Returns the value of the checked radio button of a group.
 * @param {string} name
 * @returns {string}
 */
export function checkedValue(name) {
  const radio = document.querySelector(`input[name="${name}"]:checked`);
  if (!(radio instanceof HTMLInputElement)) throw new Error(`internal error: no ${name} is checked`);
  return radio.value;
}

/**
 * @param {string} name
 * @param {string} value
 */
export function setChecked(name, value) {
  const radio = document.querySelector(`input[name="${name}"][value="${value}"]`);
  if (!(radio instanceof HTMLInputElement)) throw new Error(`internal error: no ${name} ${value} in the page`);
  radio.checked = true;
}

/** Resets all radio buttons. Firefox restores them on reload, but not the image that they belong to. */
export function resetRadios() {
  for (const radio of document.querySelectorAll("input")) {
    if (radio.type === "radio" && radio.name !== "theme") radio.checked = radio.defaultChecked;
  }
}

/**
 * @param {string} name
 * @param {() => void} listener
 */
export function onRadioChange(name, listener) {
  for (const radio of document.querySelectorAll(`input[name="${name}"]`)) {
    radio.addEventListener("change", listener);
  }
}

/**
 * Returns whether an element takes keys, pasted text and drops itself.
 * @param {EventTarget | null} target
 */
export function isTextInput(target) {
  if (!(target instanceof HTMLElement)) return false;
  if (target instanceof HTMLInputElement) return !["radio", "checkbox", "button"].includes(target.type);
  return target.isContentEditable || target.matches("select, textarea");
}

/**
 * Enables or disables the buttons of a group. If the focused button is disabled, the focus moves to an
 * enabled one, because a disabled button receives no key events.
 * @param {[HTMLButtonElement, boolean][]} buttons each with whether it is enabled
 */
export function setEnabled(buttons) {
  const focused = document.activeElement;
  for (const [button, isEnabled] of buttons) button.disabled = !isEnabled;
  if (buttons.some(([button, isEnabled]) => button === focused && !isEnabled)) {
    buttons.find(([, isEnabled]) => isEnabled)?.[0].focus();
  }
}

/**
 * Announces a message to screen readers only.
 * @param {string} text
 */
export function announce(text) {
  clearTimeout(announceTimer);
  const region = byId("announcer", HTMLElement);
  // Screen readers ignore a text that does not change, such as a second "Undone.".
  region.textContent = region.textContent === text ? `${text}\u00a0` : text;
}

/**
 * Announces a message unless another one follows shortly.
 * @param {string} text
 */
export function announceSoon(text) {
  clearTimeout(announceTimer);
  announceTimer = setTimeout(() => announce(text), ANNOUNCE_DELAY_MS);
}

/**
 * Shows a path or a name, which wraps after slashes, underscores and hyphens.
 * @param {HTMLElement} element
 * @param {string} path
 */
export function showPath(element, path) {
  const parts = path.split(/(?<=[/_-])(?=.)/);
  element.replaceChildren(...parts.flatMap((part, index) => (index > 0 ? [document.createElement("wbr"), part] : [part])));
}

/**
 * Shows a message for a moment. Screen readers announce it too.
 * @param {string} text
 */
export function showToast(text) {
  hideToast();
  // An open dialog covers the page and its toast.
  toast = document.querySelector("dialog[open] .toast") ?? byId("toast", HTMLElement);
  toast.textContent = text;
  toast.classList.add("is-shown");
  toastTimer = setTimeout(hideToast, Math.max(TOAST_MS, text.length * TOAST_MS_PER_LETTER));
}

function hideToast() {
  clearTimeout(toastTimer);
  toast?.classList.remove("is-shown");
}

/**
 * Returns the size of a photo on the page in pixels, before transforms and without the margins that "object-fit"
 * leaves; null if it is not loaded.
 * @param {HTMLImageElement} image
 * @returns {{ width: number, height: number } | null}
 */
export function shownSize(image) {
  const { naturalWidth, naturalHeight, offsetWidth, offsetHeight } = image;
  if (naturalWidth === 0 || naturalHeight === 0 || offsetWidth === 0) return null;
  const fitting = Math.min(offsetWidth / naturalWidth, offsetHeight / naturalHeight);
  const scale = getComputedStyle(image).objectFit === "scale-down" ? Math.min(fitting, 1) : fitting;
  return { width: naturalWidth * scale, height: naturalHeight * scale };
}

/**
 * Copies text to the clipboard. The asynchronous API works only in secure contexts; elsewhere the text
 * is copied from a selection.
 * @param {string} text
 * @returns {Promise<boolean>} whether it was copied
 */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelection(text);
  }
}

/** @param {string} text */
function copySelection(text) {
  const field = document.createElement("textarea");
  field.value = text;
  field.setAttribute("aria-hidden", "true");
  field.className = "visually-hidden";
  // While a modal dialog is open, only its content can be selected.
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  const focused = document.activeElement;
  field.select();
  try {
    return document.execCommand("copy");
  } catch {
    return false;
  } finally {
    field.remove();
    if (focused instanceof HTMLElement) focused.focus();
  }
}
