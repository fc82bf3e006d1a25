// What the pen leaves behind: points with a width, smoothed as they come.
// Lengths are in units of the paper, whose side is SIDE whatever size the screen gives it.

export const SIDE = 1000;

/** Widths by name, in units. A line of 10 is as wide as those of the sketches models train on. */
export const SIZES = Object.freeze({ fine: 6, medium: 10, broad: 22 });
export const ERASER_SCALE = 4;

/** @typedef {"pen" | "eraser"} Tool */
/** @typedef {keyof typeof SIZES} SizeName */
/** @typedef {{ x: number, y: number, width: number }} Point */
/** @typedef {{ kind: "stroke", tool: Tool, points: Point[] }} Stroke */

/**
 * Where a pointer is.
 * @typedef {object} Touchdown
 * @property {number} x in units
 * @property {number} y in units
 * @property {number | null} pressure 0 to 1; null for what cannot feel any, such as a mouse
 * @property {number} timeMs
 */

// How much of the last point stays in the next: takes the tremble out of hands and mice.
const CALM = { pen: 0.3, eraser: 0 };
const CLOSE = 0.9;

/** A stroke while it is drawn. */
export class StrokeInProgress {
  /**
   * @param {Tool} tool
   * @param {number} size in units
   * @param {Touchdown} at
   */
  constructor(tool, size, at) {
    this.tool = tool;
    this.size = tool === "eraser" ? size * ERASER_SCALE : size;
    this.last = at;
    const width = this.tool === "eraser" ? this.size : widthOf(this.size, at.pressure, 0);
    /** @type {Stroke} */
    this.stroke = { kind: "stroke", tool, points: [{ x: at.x, y: at.y, width }] };
  }

  /**
   * Takes the next place of the pointer; says whether it made a point.
   * @param {Touchdown} at
   * @returns {boolean}
   */
  add(at) {
    const points = this.stroke.points;
    const before = points[points.length - 1];
    const calm = CALM[this.tool];
    const x = at.x + (before.x - at.x) * calm;
    const y = at.y + (before.y - at.y) * calm;
    if (Math.hypot(x - before.x, y - before.y) < CLOSE) return false;
    points.push({ x, y, width: this.#width(at, before.width) });
    this.last = at;
    return true;
  }

  /**
   * Ends the stroke exactly where the pointer left the paper.
   * @returns {Stroke}
   */
  finished() {
    const points = this.stroke.points;
    const before = points[points.length - 1];
    if (Math.hypot(this.last.x - before.x, this.last.y - before.y) >= CLOSE) {
      points.push({ x: this.last.x, y: this.last.y, width: before.width });
    }
    return this.stroke;
  }

  /**
   * @param {Touchdown} at
   * @param {number} before
   */
  #width(at, before) {
    if (this.tool === "eraser") return this.size;
    const elapsed = Math.max(1, at.timeMs - this.last.timeMs);
    const speed = Math.hypot(at.x - this.last.x, at.y - this.last.y) / elapsed;
    const wanted = widthOf(this.size, at.pressure, speed);
    return before + (wanted - before) * (at.pressure === null ? 0.2 : 0.5);
  }
}

/**
 * The width of a line under this pressure, or, where none is felt, at this speed (units per ms):
 * a quick line is a little thinner, as ink would be.
 * @param {number} size
 * @param {number | null} pressure
 * @param {number} speed
 * @returns {number}
 */
function widthOf(size, pressure, speed) {
  if (pressure === null) return size * Math.max(0.75, 1.1 - 0.07 * speed);
  return size * (0.3 + 1.1 * Math.min(1, Math.max(0, pressure)) ** 0.7);
}
