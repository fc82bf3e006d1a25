// The filters above the photos: a folder, and the days on which photos were taken.

import { announce, byId } from "./dom.js";

/**
 * Which photos are searched; "" leaves an end open, or searches all folders. Days are ISO dates.
 * @typedef {{ under: string, taken_from: string, taken_to: string }} Filter
 */

const from = byId("taken-from", HTMLInputElement);
const to = byId("taken-to", HTMLInputElement);
const folder = byId("folder", HTMLSelectElement);

/** @returns {Filter} */
export function currentFilter() {
  const days = [from.value, to.value];
  // Two days in any order are the period between them.
  if (!days.includes("")) days.sort();
  return { under: folder.value, taken_from: days[0], taken_to: days[1] };
}

/** @returns {boolean} whether photos of some days are left out */
export function hasDays() {
  return from.value !== "" || to.value !== "";
}

/** @param {() => void} run called after each change */
export function onFilterChange(run) {
  folder.addEventListener("change", run);
  const changed = () => {
    showDays();
    run();
  };
  for (const input of [from, to]) input.addEventListener("change", changed);
  byId("taken-clear", HTMLButtonElement).addEventListener("click", () => {
    from.value = to.value = "";
    changed();
    byId("dates", HTMLElement).hidePopover();
    announce("Photos of all days.");
  });
  showDays();
  const button = byId("dates-button", HTMLButtonElement);
  const popover = byId("dates", HTMLElement);
  popover.addEventListener("toggle", () => {
    // Below the button or, where there is no room, above it.
    const { top, bottom, right } = button.getBoundingClientRect();
    const height = popover.offsetHeight;
    const isBelow = bottom + 6 + height <= innerHeight || top < height + 6;
    popover.style.top = `${isBelow ? Math.max(0, Math.min(bottom + 6, innerHeight - height)) : top - 6 - height}px`;
    popover.style.left = `${Math.max(12, right - popover.offsetWidth)}px`;
  });
}

/** Shows the days on the button, and whether there are any to clear. */
function showDays() {
  const { taken_from: first, taken_to: last } = currentFilter();
  byId("dates-label", HTMLElement).textContent = daysText(first, last);
  byId("dates-button", HTMLButtonElement).classList.toggle("is-set", hasDays());
  byId("taken-clear", HTMLButtonElement).disabled = !hasDays();
}

/**
 * @param {string} first
 * @param {string} last
 */
function daysText(first, last) {
  if (first === "" && last === "") return "All dates";
  if (first === last) return shortDay(first);
  if (last === "") return `From ${shortDay(first)}`;
  if (first === "") return `Until ${shortDay(last)}`;
  return `${shortDay(first)} – ${shortDay(last)}`;
}

/** @param {string} day */
function shortDay(day) {
  return new Date(`${day}T12:00`).toLocaleDateString(undefined, { dateStyle: "medium" });
}
