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

/**
 * @param {string} name
 * @param {() => void} changed
 */
export function onChoice(name, changed) {
  for (const radio of document.querySelectorAll(`input[name="${name}"]`)) {
    radio.addEventListener("change", changed);
  }
}
