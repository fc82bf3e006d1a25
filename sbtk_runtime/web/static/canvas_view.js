// The part of the canvas that is shown: zoom and position. Nothing is changed in place.

import { CANVAS_UNITS } from "./drawing.js";

/** @typedef {{ scale: number, x: number, y: number }} View x and y are the upper left corner, in units */
/** @typedef {{ x: number, y: number, spread: number }} Grip a place on the screen, as shares of the canvas; `spread` is the distance of two fingers */

export const MAX_SCALE = 8;
export const ZOOM_STEP = 1.5;

/** @type {View} */
export const WHOLE = Object.freeze({ scale: 1, x: 0, y: 0 });
/** @type {Grip} */
export const MIDDLE = Object.freeze({ x: 0.5, y: 0.5, spread: 1 });

/**
 * Returns the view after a grip has moved: what was under it stays under it.
 * @param {View} view
 * @param {Grip} from
 * @param {Grip} to
 * @returns {View} within the canvas
 */
export function gripped(view, from, to) {
  const wanted = (view.scale * to.spread) / from.spread;
  const scale = Math.min(MAX_SCALE, Math.max(1, wanted < 1.02 ? 1 : wanted));
  const side = CANVAS_UNITS / scale;
  const held = shownAt(view, from);
  return { scale, ...within({ x: held.x - to.x * side, y: held.y - to.y * side }, side) };
}

/**
 * Returns the view about a grip, enlarged by a factor.
 * @param {View} view
 * @param {number} factor
 * @param {Grip} [grip]
 */
export function zoomed(view, factor, grip = MIDDLE) {
  return gripped(view, grip, { ...grip, spread: grip.spread * factor });
}

/**
 * Returns the nearest view that shows a place, with a margin.
 * @param {View} view
 * @param {{ x: number, y: number }} place in units
 * @returns {View}
 */
export function showing(view, place) {
  const side = CANVAS_UNITS / view.scale;
  const margin = side / 10;
  const clamp = (/** @type {number} */ start, /** @type {number} */ at) =>
    Math.min(at - margin, Math.max(at + margin - side, start));
  return { scale: view.scale, ...within({ x: clamp(view.x, place.x), y: clamp(view.y, place.y) }, side) };
}

/**
 * Returns the place on the canvas, in units, that is shown at shares of the canvas on the screen.
 * @param {View} view
 * @param {{ x: number, y: number }} shares
 */
export function shownAt(view, { x, y }) {
  const side = CANVAS_UNITS / view.scale;
  return { x: view.x + x * side, y: view.y + y * side };
}

/**
 * @param {{ x: number, y: number }} corner
 * @param {number} side
 */
function within({ x, y }, side) {
  const last = CANVAS_UNITS - side;
  return { x: Math.min(last, Math.max(0, x)), y: Math.min(last, Math.max(0, y)) };
}
