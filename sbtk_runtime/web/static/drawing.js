// The drawing: strokes and images, with undo and redo.
// Lengths are in canvas units. The canvas is CANVAS_UNITS wide and high at any size on the screen.

/** @typedef {import("./upload.js").UploadedImage} UploadedImage */
/** @typedef {"pen" | "eraser"} Tool */
/** @typedef {keyof typeof LINE_WIDTHS} LineWidth */
/** @typedef {{ x: number, y: number, width: number }} Point */
/** @typedef {{ kind: "stroke", tool: Tool, points: Point[] }} Stroke */
/** @typedef {Stroke | { kind: "image", image: UploadedImage } | { kind: "clear" }} Mark */

/**
 * A sample of a pointer.
 * @typedef {object} PointerSample
 * @property {number} x in units
 * @property {number} y in units
 * @property {number | null} pressure 0 to 1; null for devices without pressure, such as a mouse
 * @property {number} timeMs
 */

export const CANVAS_UNITS = 1000;

/** Line widths in units. 10 matches the lines of the sketches that the model was trained on. */
export const LINE_WIDTHS = Object.freeze({ thin: 6, medium: 10, thick: 22 });
export const ERASER_SCALE = 4;

// Exponential smoothing against jitter: the weight of the previous point.
const SMOOTHING = { pen: 0.3, eraser: 0 };
const MIN_DISTANCE = 0.9;

/** The marks on the canvas, oldest first. Dispatches "change" after every modification. */
export class Drawing extends EventTarget {
  /** @type {Mark[]} */
  #marks = [];
  /** @type {Mark[]} */
  #undone = [];

  /** @param {readonly Mark[]} marks */
  add(...marks) {
    this.#marks.push(...marks);
    this.#undone = [];
    this.#changed();
  }

  /** Clears the canvas. Undo restores it. */
  clear() {
    if (this.visible.length > 0) this.add({ kind: "clear" });
  }

  /** @returns {boolean} whether there was anything to undo */
  undo() {
    const mark = this.#marks.pop();
    if (mark === undefined) return false;
    this.#undone.push(mark);
    this.#changed();
    return true;
  }

  /** @returns {boolean} whether there was anything to redo */
  redo() {
    const mark = this.#undone.pop();
    if (mark === undefined) return false;
    this.#marks.push(mark);
    this.#changed();
    return true;
  }

  get canUndo() {
    return this.#marks.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  /** @returns {readonly Mark[]} the marks since the canvas was last cleared or replaced by an image */
  get visible() {
    const start = this.#marks.findLastIndex((mark) => mark.kind !== "stroke");
    if (start < 0) return this.#marks;
    return this.#marks.slice(this.#marks[start].kind === "clear" ? start + 1 : start);
  }

  /** @returns {UploadedImage | null} the image, if there are no strokes over it */
  get unmarkedImage() {
    const [first, ...others] = this.visible;
    return first?.kind === "image" && others.length === 0 ? first.image : null;
  }

  /** @returns {UploadedImage | null} the image, with or without strokes over it */
  get image() {
    const first = this.visible[0];
    return first?.kind === "image" ? first.image : null;
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** A stroke that is being drawn. */
export class StrokeBuilder {
  /**
   * @param {Tool} tool
   * @param {number} size in units
   * @param {PointerSample} sample
   */
  constructor(tool, size, sample) {
    this.tool = tool;
    this.size = tool === "eraser" ? size * ERASER_SCALE : size;
    this.last = sample;
    const width = this.tool === "eraser" ? this.size : lineWidth(this.size, sample.pressure, 0);
    /** @type {Stroke} */
    this.stroke = { kind: "stroke", tool, points: [{ x: sample.x, y: sample.y, width }] };
  }

  /**
   * Adds a sample; returns whether it became a point.
   * @param {PointerSample} sample
   * @returns {boolean}
   */
  add(sample) {
    const points = this.stroke.points;
    const previous = points[points.length - 1];
    const weight = SMOOTHING[this.tool];
    const x = sample.x + (previous.x - sample.x) * weight;
    const y = sample.y + (previous.y - sample.y) * weight;
    if (Math.hypot(x - previous.x, y - previous.y) < MIN_DISTANCE) return false;
    points.push({ x, y, width: this.#width(sample, previous.width) });
    this.last = sample;
    return true;
  }

  /**
   * Ends the stroke at the last sample, without smoothing.
   * @returns {Stroke}
   */
  finish() {
    const points = this.stroke.points;
    const previous = points[points.length - 1];
    if (Math.hypot(this.last.x - previous.x, this.last.y - previous.y) >= MIN_DISTANCE) {
      points.push({ x: this.last.x, y: this.last.y, width: previous.width });
    }
    return this.stroke;
  }

  /**
   * @param {PointerSample} sample
   * @param {number} previous
   */
  #width(sample, previous) {
    if (this.tool === "eraser") return this.size;
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
