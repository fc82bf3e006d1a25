// The paper on the screen: shows the drawing as sharply as the screen can, and the stroke at hand
// while it grows. Pointers and keys both draw through this.

import { paintCurve, paintEnd, paintMarks } from "./ink.js";
import { ERASER_SCALE, SIDE, SIZES, StrokeInProgress } from "./strokes.js";

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./strokes.js").Touchdown} Touchdown */
/** @typedef {import("./strokes.js").Tool} Tool */
/** @typedef {import("./strokes.js").Stroke} Stroke */

const INK = "#1d1c1a";
const RING = "#8d877c";
const MAX_SCALE = 3;

/**
 * Dispatches "draw" while a stroke grows and "drop" when it is taken back. A stroke that ends is the
 * drawing's from then on.
 */
export class SketchPad extends EventTarget {
  /** @type {Tool} */
  tool = "pen";
  /** @type {number} in units */
  size = SIZES.medium;
  /** @type {StrokeInProgress | null} */
  #growing = null;
  #sidePx = 1;

  /**
   * @param {HTMLCanvasElement} below holds what is drawn
   * @param {HTMLCanvasElement} above the end of the stroke at hand and the eraser's ring
   * @param {Drawing} drawing
   */
  constructor(below, above, drawing) {
    super();
    this.drawing = drawing;
    this.element = above;
    this.below = contextOf(below);
    this.above = contextOf(above);
    drawing.addEventListener("change", () => this.#repaint());
    new ResizeObserver(() => this.#fit()).observe(above);
    window.addEventListener("resize", () => this.#fit());
    this.#fit();
  }

  /** @returns {readonly Stroke[]} the stroke at hand, as far as it goes */
  get unfinished() {
    return this.#growing === null ? [] : [this.#growing.stroke];
  }

  get isDrawing() {
    return this.#growing !== null;
  }

  /**
   * @param {Touchdown} at
   * @param {Tool} [tool]
   */
  begin(at, tool = this.tool) {
    this.lift();
    this.#growing = new StrokeInProgress(tool, this.size, at);
    this.#paintTip(at, []);
    this.dispatchEvent(new Event("draw"));
  }

  /**
   * @param {readonly Touchdown[]} places since the last call, oldest first
   * @param {readonly Touchdown[]} [ahead] where the pointer is expected next
   */
  extend(places, ahead = []) {
    const growing = this.#growing;
    if (growing === null) return;
    let isLonger = false;
    for (const place of places) {
      if (growing.add(place)) {
        isLonger = true;
        paintCurve(this.below, growing.stroke, growing.stroke.points.length - 2, INK);
      }
    }
    const last = places[places.length - 1];
    if (last !== undefined) this.#paintTip(last, ahead);
    if (isLonger) this.dispatchEvent(new Event("draw"));
  }

  /** Ends the stroke at hand, if there is one. */
  lift() {
    if (this.#growing === null) return;
    const stroke = this.#growing.finished();
    this.#growing = null;
    this.#wipe();
    this.drawing.add(stroke);
  }

  /** Takes the stroke at hand back, as if the pen had never touched. */
  drop() {
    if (this.#growing === null) return;
    this.#growing = null;
    this.#wipe();
    this.#repaint();
    this.dispatchEvent(new Event("drop"));
  }

  /**
   * Shows where the eraser is, or with `isKept` where the pen of the keyboard is.
   * @param {{ x: number, y: number } | null} at
   * @param {{ isKept?: boolean }} [how]
   */
  hover(at, { isKept = false } = {}) {
    if (this.isDrawing && !isKept) return;
    this.#wipe();
    if (at === null) return;
    if (this.tool === "eraser") this.#ring(at, this.size * ERASER_SCALE);
    if (isKept) this.#cross(at);
  }

  #fit() {
    const shown = this.element.getBoundingClientRect().width;
    const sidePx = Math.max(1, Math.round(shown * Math.min(MAX_SCALE, window.devicePixelRatio || 1)));
    if (sidePx === this.#sidePx) return;
    this.#sidePx = sidePx;
    for (const context of [this.below, this.above]) {
      context.canvas.width = context.canvas.height = sidePx;
      context.setTransform(sidePx / SIDE, 0, 0, sidePx / SIDE, 0, 0);
    }
    this.#repaint();
  }

  #repaint() {
    this.below.clearRect(0, 0, SIDE, SIDE);
    paintMarks(this.below, [...this.drawing.visible, ...this.unfinished], INK);
  }

  /**
   * The last bit of the stroke is painted above until its curve is known.
   * @param {Touchdown} at
   * @param {readonly Touchdown[]} ahead
   */
  #paintTip(at, ahead) {
    const growing = this.#growing;
    if (growing === null) return;
    if (growing.tool === "eraser") {
      paintEnd(this.below, growing.stroke, INK);
      this.#wipe();
      this.#ring(at, growing.size);
      return;
    }
    this.#wipe();
    const width = growing.stroke.points[growing.stroke.points.length - 1].width;
    paintEnd(this.above, growing.stroke, INK, [at, ...ahead].map(({ x, y }) => ({ x, y, width })));
  }

  #wipe() {
    this.above.clearRect(0, 0, SIDE, SIDE);
  }

  /**
   * @param {{ x: number, y: number }} at
   * @param {number} across
   */
  #ring(at, across) {
    this.above.strokeStyle = RING;
    this.above.lineWidth = 2;
    this.above.beginPath();
    this.above.arc(at.x, at.y, across / 2, 0, 2 * Math.PI);
    this.above.stroke();
  }

  /** @param {{ x: number, y: number }} at */
  #cross({ x, y }) {
    this.above.strokeStyle = "#b34c12";
    this.above.lineWidth = 3;
    this.above.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      this.above.moveTo(x + 8 * dx, y + 8 * dy);
      this.above.lineTo(x + 26 * dx, y + 26 * dy);
    }
    this.above.stroke();
  }
}

/**
 * @param {HTMLCanvasElement} canvas
 * @returns {CanvasRenderingContext2D}
 */
function contextOf(canvas) {
  const context = canvas.getContext("2d");
  if (context === null) throw new Error("this browser has no 2D canvas");
  return context;
}
