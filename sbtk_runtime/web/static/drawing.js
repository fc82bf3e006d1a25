// The drawing: strokes and images, with undo and redo.
// Lengths are in canvas units. The canvas is CANVAS_UNITS wide and high at any size on the screen.

import { snapped } from "./stroke_geometry.js";

/** @typedef {import("./upload.js").UploadedImage} UploadedImage */
/** @typedef {"pen" | "line" | "eraser" | "stroke-eraser" | "select"} Tool */
/** @typedef {keyof typeof LINE_WIDTHS} LineWidth */
/** @typedef {{ x: number, y: number, width: number }} Point */
/** @typedef {{ kind: "stroke", tool: "pen" | "eraser", points: Point[] }} Stroke */
/** @typedef {{ kind: "image", image: UploadedImage, isTraced?: boolean }} ImageMark a traced image is not searched for */
/** @typedef {Stroke | ImageMark} Mark */
/** @typedef {Mark | { kind: "replace", marks: readonly Mark[] }} Step */

/**
 * A sample of a pointer.
 * @typedef {object} PointerSample
 * @property {number} x in units
 * @property {number} y in units
 * @property {number | null} pressure 0 to 1; null for devices without pressure, such as a mouse
 * @property {number} timeMs
 * @property {boolean} [hasShift] whether Shift is held: straight lines, fixed angles
 */

export const CANVAS_UNITS = 1000;

/** Line widths in units. 10 matches the lines of the sketches that the model was trained on. */
export const LINE_WIDTHS = Object.freeze({ thin: 6, medium: 10, thick: 22 });
export const ERASER_SCALE = 4;

// Exponential smoothing against jitter: the weight of the previous point.
const SMOOTHING = { pen: 0.3, eraser: 0 };
const MIN_DISTANCE = 0.9;
const ANGLE_STEP_DEGREES = 15;

/** The marks on the canvas, oldest first. Dispatches "change" after every modification. */
export class Drawing extends EventTarget {
  /** @type {Step[]} */
  #steps = [];
  /** @type {Step[]} */
  #undone = [];

  /** @param {readonly Step[]} steps */
  add(...steps) {
    this.#steps.push(...steps);
    this.#undone = [];
    this.#changed();
  }

  /**
   * Replaces everything on the canvas, as one step for undo.
   * @param {readonly Mark[]} marks
   */
  replace(marks) {
    this.add({ kind: "replace", marks });
  }

  /** Clears the canvas, except for an image that is being traced. Undo restores it. */
  clear() {
    const { visible } = this;
    if (visible.length > 0) this.replace(this.isSearchable ? visible.filter(isTraced) : []);
  }

  /** @returns {boolean} whether there was anything to undo */
  undo() {
    const step = this.#steps.pop();
    if (step === undefined) return false;
    this.#undone.push(step);
    this.#changed();
    return true;
  }

  /** @returns {boolean} whether there was anything to redo */
  redo() {
    const step = this.#undone.pop();
    if (step === undefined) return false;
    this.#steps.push(step);
    this.#changed();
    return true;
  }

  get canUndo() {
    return this.#steps.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  /** @returns {readonly Mark[]} the marks since the canvas was last replaced */
  get visible() {
    const start = this.#steps.findLastIndex((step) => step.kind !== "stroke");
    const strokes = /** @type {Stroke[]} */ (this.#steps.slice(start + 1));
    const first = this.#steps[start];
    if (first === undefined || first.kind === "stroke") return strokes;
    return first.kind === "image" ? [first, ...strokes] : [...first.marks, ...strokes];
  }

  /** @returns {boolean} whether there is anything to search for */
  get isSearchable() {
    return this.visible.some((mark) => !isTraced(mark));
  }

  /** @returns {UploadedImage | null} the image, if there are no strokes over it */
  get unmarkedImage() {
    return this.visible.length === 1 ? this.image : null;
  }

  /** @returns {UploadedImage | null} the image to search with, with or without strokes over it */
  get image() {
    const first = this.visible[0];
    return first?.kind === "image" && !first.isTraced ? first.image : null;
  }

  /** @returns {UploadedImage | null} the image that is being traced */
  get traced() {
    const first = this.visible[0];
    return first?.kind === "image" && first.isTraced ? first.image : null;
  }

  /**
   * Puts the image under the strokes, to trace it and search for the strokes alone, or searches with it again.
   * @param {boolean} isTraced
   */
  trace(isTraced) {
    const [first, ...strokes] = this.visible;
    if (first?.kind === "image") this.replace([{ ...first, isTraced }, ...strokes]);
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** @param {Mark} mark */
function isTraced(mark) {
  return mark.kind === "image" && mark.isTraced === true;
}

/** A stroke that is being drawn. */
export class StrokeBuilder {
  /** @type {Point[]} */
  #points;
  /** @type {Point | null} the end of a straight line, which moves with the pointer */
  #end = null;

  /**
   * @param {"pen" | "line" | "eraser"} tool
   * @param {number} size in units
   * @param {PointerSample} sample
   */
  constructor(tool, size, sample) {
    this.isEraser = tool === "eraser";
    this.isLine = tool === "line";
    this.size = this.isEraser ? size * ERASER_SCALE : size;
    this.last = sample;
    const pressure = this.isLine ? null : sample.pressure;
    const width = this.isEraser || this.isLine ? this.size : lineWidth(this.size, pressure, 0);
    this.#points = [{ x: sample.x, y: sample.y, width }];
  }

  /** @returns {Stroke} the stroke so far */
  get stroke() {
    return { kind: "stroke", tool: this.isEraser ? "eraser" : "pen", points: this.#withEnd() };
  }

  /** @returns {Stroke | null} the straight line that is being drawn */
  get straight() {
    if (this.#end === null) return null;
    return { kind: "stroke", tool: "pen", points: [this.#points[this.#points.length - 1], this.#end] };
  }

  /**
   * Adds a sample; returns whether it became a point that stays.
   * @param {PointerSample} sample
   * @returns {boolean}
   */
  add(sample) {
    if (this.isLine || (sample.hasShift && !this.isEraser)) {
      if (this.#end === null && !this.isLine) this.#addLast();
      const previous = this.#points[this.#points.length - 1];
      const place = this.isLine && sample.hasShift ? snapped(previous, sample, ANGLE_STEP_DEGREES) : sample;
      this.#end = { x: place.x, y: place.y, width: previous.width };
      this.last = sample;
      return false;
    }
    this.#points = this.#withEnd();
    this.#end = null;
    return this.#addFreehand(sample, this.#points[this.#points.length - 1]);
  }

  /**
   * Ends the stroke at the last sample, without smoothing.
   * @returns {Stroke}
   */
  finish() {
    if (this.#end === null) this.#addLast();
    return this.stroke;
  }

  /** Adds the last sample, behind which smoothing has left the last point. */
  #addLast() {
    const { x, y } = this.last;
    const previous = this.#points[this.#points.length - 1];
    if (Math.hypot(x - previous.x, y - previous.y) < MIN_DISTANCE) return;
    this.#points.push({ x, y, width: previous.width });
  }

  /**
   * @param {PointerSample} sample
   * @param {Point} previous
   */
  #addFreehand(sample, previous) {
    const weight = this.isEraser ? SMOOTHING.eraser : SMOOTHING.pen;
    const x = sample.x + (previous.x - sample.x) * weight;
    const y = sample.y + (previous.y - sample.y) * weight;
    if (Math.hypot(x - previous.x, y - previous.y) < MIN_DISTANCE) return false;
    this.#points.push({ x, y, width: this.#width(sample, previous.width) });
    this.last = sample;
    return true;
  }

  /** Returns the points with the straight line, whose ends are doubled: curves are rounded only within a unit. */
  #withEnd() {
    if (this.#end === null) return this.#points;
    const [from, to] = [this.#points[this.#points.length - 1], this.#end];
    const length = Math.hypot(to.x - from.x, to.y - from.y);
    if (length < MIN_DISTANCE) return this.#points;
    const at = (/** @type {number} */ share) => ({
      x: from.x + (to.x - from.x) * share,
      y: from.y + (to.y - from.y) * share,
      width: to.width,
    });
    const near = Math.min(0.4, 1 / length);
    return [...this.#points, at(near), at(1 - near), to];
  }

  /**
   * @param {PointerSample} sample
   * @param {number} previous
   */
  #width(sample, previous) {
    if (this.isEraser) return this.size;
    const elapsed = Math.max(1, sample.timeMs - this.last.timeMs);
    const speed = Math.hypot(sample.x - this.last.x, sample.y - this.last.y) / elapsed;
    const target = lineWidth(this.size, sample.pressure, speed);
    return previous + (target - previous) * (sample.pressure === null ? 0.2 : 0.5);
  }
}

/**
 * Returns the line width for a pressure or, without pressure, for a speed in units per ms: fast lines are
 * slightly thinner.
 * @param {number} size
 * @param {number | null} pressure
 * @param {number} speed
 * @returns {number}
 */
function lineWidth(size, pressure, speed) {
  if (pressure === null) return size * Math.max(0.75, 1.1 - 0.07 * speed);
  return size * (0.3 + 1.1 * Math.min(1, Math.max(0, pressure)) ** 0.7);
}
