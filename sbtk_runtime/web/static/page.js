// The elements of index.html, by their ids.

/**
 * @template {HTMLElement} T
 * @param {string} id
 * @param {{ new (): T, prototype: T }} type
 * @returns {T}
 */
export function byId(id, type) {
  const element = document.getElementById(id);
  if (!(element instanceof type)) throw new Error(`the page has no ${type.name} #${id}`);
  return element;
}

/**
 * The value of the chosen radio button.
 * @param {string} name
 * @returns {string}
 */
export function chosen(name) {
  const radio = document.querySelector(`input[name="${name}"]:checked`);
  if (!(radio instanceof HTMLInputElement)) throw new Error(`nothing is chosen for ${name}`);
  return radio.value;
}

/**
 * @param {string} name
 * @param {string} value
 */
export function choose(name, value) {
  const radio = document.querySelector(`input[name="${name}"][value="${value}"]`);
  if (!(radio instanceof HTMLInputElement)) throw new Error(`there is no ${name} ${value}`);
  radio.checked = true;
}

/** Puts all radio buttons back: Firefox keeps them over a reload, which loses the picture that they go with. */
export function chooseDefaults() {
  for (const radio of document.querySelectorAll("input")) {
    if (radio.type === "radio") radio.checked = radio.defaultChecked;
  }
}

/**
 * Lets some of the buttons that belong together be pressed. The focus goes on to one of these when its
 * own cannot be pressed any more: else the keys that follow would reach nothing.
 * @param {[HTMLButtonElement, boolean][]} buttons each with whether it can be pressed
 */
export function enable(buttons) {
  const focused = document.activeElement;
  for (const [button, isEnabled] of buttons) button.disabled = !isEnabled;
  if (buttons.some(([button, isEnabled]) => button === focused && !isEnabled)) {
    buttons.find(([, isEnabled]) => isEnabled)?.[0].focus();
  }
}

/**
 * @param {string} name
 * @param {() => void} changed
 */
export function onChoice(name, changed) {
  for (const radio of document.querySelectorAll(`input[name="${name}"]`)) {
    radio.addEventListener("change", changed);
  }
}
