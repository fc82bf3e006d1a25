// The eraser that removes whole strokes.

import { distanceTo, visibleParts, without } from "./stroke_geometry.js";

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./drawing.js").Mark} Mark */
/** @typedef {import("./stroke_geometry.js").Place} Place */

/** One sweep of the eraser: the strokes that it touches are removed together. */
export class StrokeEraser {
  /** @type {Set<Mark>} */
  #removed = new Set();

  /**
   * @param {Drawing} drawing
   * @param {number} reach in units
   * @param {Place} start
   */
  constructor(drawing, reach, start) {
    this.drawing = drawing;
    this.reach = reach;
    this.last = start;
    this.parts = visibleParts(drawing.visible);
    this.before = drawing.visible;
    /** @type {readonly Mark[]} what is left */
    this.marks = this.before;
    this.extend(start);
  }

  /** @param {Place} place */
  extend(place) {
    const before = this.#removed.size;
    for (const [stroke, parts] of this.parts) {
      if (parts.every((part) => distanceTo(part, this.last, place) > this.reach)) continue;
      this.#removed.add(stroke);
      this.parts.delete(stroke);
    }
    this.last = place;
    if (this.#removed.size > before) this.marks = without(this.before, this.#removed);
  }

  finish() {
    if (this.#removed.size > 0) this.drawing.replace(this.marks);
  }
}
