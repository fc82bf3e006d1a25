// The selected strokes: what is selected, and their transforms.

import { boundsOf, centreOf, distanceTo, enters, rotation, scaling, snapped, transformed, visibleParts, without } from "./stroke_geometry.js";
import { CANVAS_UNITS } from "./drawing.js";

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./drawing.js").Mark} Mark */
/** @typedef {import("./drawing.js").PointerSample} PointerSample */
/** @typedef {import("./drawing.js").Stroke} Stroke */
/** @typedef {import("./stroke_geometry.js").Box} Box */
/** @typedef {import("./stroke_geometry.js").Place} Place */
/** @typedef {"scale" | "rotate" | "move" | "mark"} DragKind */

const ANGLE_STEP_DEGREES = 15;
const COPY_OFFSET = 30;
const MIN_FACTOR = 0.05;
// Lengths on the screen, in pixels.
const REACH_PX = 12;
const PADDING_PX = 9;
const ROTATE_HANDLE_PX = 30;
const CLICK_PX = 4;

/** Dispatches "change" when other strokes are selected. */
export class Selection extends EventTarget {
  /** @type {readonly Stroke[]} */
  strokes = [];

  /** @param {Drawing} drawing */
  constructor(drawing) {
    super();
    this.drawing = drawing;
    drawing.addEventListener("change", () => {
      const visible = new Set(drawing.visible);
      const left = this.strokes.filter((stroke) => visible.has(stroke));
      if (left.length < this.strokes.length) this.select(left);
    });
  }

  /** @returns {Box | null} around the ink */
  get bounds() {
    return boundsOf(this.strokes);
  }

  /** @param {readonly Stroke[]} strokes */
  select(strokes) {
    if (strokes.length === 0 && this.strokes.length === 0) return;
    this.strokes = strokes;
    this.dispatchEvent(new Event("change"));
  }

  selectAll() {
    this.select([...visibleParts(this.drawing.visible).keys()]);
  }

  /**
   * Selects the stroke after the selected one, or before it, in the order in which they were drawn.
   * @param {1 | -1} direction
   */
  selectNext(direction) {
    const all = [...visibleParts(this.drawing.visible).keys()];
    if (all.length === 0) return;
    const last = this.strokes[direction > 0 ? this.strokes.length - 1 : 0];
    const from = last === undefined ? (direction > 0 ? -1 : 0) : all.indexOf(last);
    this.select([all[(from + direction + all.length) % all.length]]);
  }

  /** @param {Stroke} stroke */
  toggle(stroke) {
    const others = this.strokes.filter((other) => other !== stroke);
    this.select(others.length < this.strokes.length ? others : [...others, stroke]);
  }

  /**
   * Returns the marks with the selected strokes transformed, and these strokes. They come last, so that what
   * was erased beside them stays erased; of strokes that were partly erased, the visible parts are left.
   * @param {DOMMatrix} matrix
   * @returns {{ marks: Mark[], strokes: Stroke[] }}
   */
  transformed(matrix) {
    const { visible } = this.drawing;
    const parts = visibleParts(visible);
    const strokes = this.strokes
      .flatMap((stroke) => parts.get(stroke) ?? [])
      .map((part) => transformed(part, matrix));
    return { marks: [...without(visible, new Set(this.strokes)), ...strokes], strokes };
  }

  /**
   * Transforms the selected strokes, unless that moves their centre off the canvas.
   * @param {DOMMatrix} matrix
   */
  transform(matrix) {
    if (this.strokes.length === 0 || matrix.isIdentity) return;
    const { marks, strokes } = this.transformed(keptOnCanvas(matrix, this.bounds));
    this.strokes = strokes;
    this.drawing.replace(marks);
  }

  /** @param {number} dx @param {number} dy */
  move(dx, dy) {
    this.transform(new DOMMatrix().translate(dx, dy));
  }

  /** @param {number} degrees clockwise */
  rotate(degrees) {
    const { bounds } = this;
    if (bounds !== null) this.transform(rotation(centreOf(bounds), degrees));
  }

  /** @param {number} scaleX @param {number} [scaleY] */
  scale(scaleX, scaleY = scaleX) {
    const { bounds } = this;
    if (bounds !== null) this.transform(scaling(centreOf(bounds), scaleX, scaleY));
  }

  /** Adds a copy beside the selected strokes, and selects it. */
  duplicate() {
    if (this.strokes.length === 0) return;
    const matrix = keptOnCanvas(new DOMMatrix().translate(COPY_OFFSET, COPY_OFFSET), this.bounds);
    const { strokes } = this.transformed(matrix);
    this.strokes = strokes;
    this.drawing.replace([...this.drawing.visible, ...strokes]);
    this.dispatchEvent(new Event("change"));
  }

  /** Removes the selected strokes. */
  remove() {
    if (this.strokes.length > 0) this.drawing.replace(without(this.drawing.visible, new Set(this.strokes)));
  }
}

/** A drag with the selection tool: marks strokes with a box, or moves, scales or rotates the selected ones. */
export class SelectionDrag {
  matrix = new DOMMatrix();
  /** @type {Box | null} that marks strokes */
  box = null;
  #isClick = true;

  /**
   * @param {Selection} selection
   * @param {PointerSample} start
   * @param {number} unitsPerPx
   */
  constructor(selection, start, unitsPerPx) {
    this.selection = selection;
    this.start = start;
    this.unitsPerPx = unitsPerPx;
    this.parts = visibleParts(selection.drawing.visible);
    const handle = handleAt(selection.bounds, start, unitsPerPx);
    this.#press(handle, handle === null ? this.#strokeAt(start) : null);
    this.kind = handle?.kind ?? (this.#holds(start) ? "move" : "mark");
    this.anchor = handle?.anchor ?? start;
    this.held = handle?.held ?? start;
    this.selected = selection.strokes;
    this.before = selection.drawing.visible;
    this.rest = without(this.before, new Set(this.selected));
    this.chosen = this.selected.flatMap((stroke) => this.parts.get(stroke) ?? []);
  }

  /** @returns {readonly Mark[]} the drawing as the drag shows it */
  get marks() {
    if (this.matrix.isIdentity) return this.before;
    return [...this.rest, ...this.chosen.map((part) => transformed(part, this.matrix))];
  }

  /** @param {PointerSample} sample */
  extend(sample) {
    const [dx, dy] = [sample.x - this.start.x, sample.y - this.start.y];
    if (Math.hypot(dx, dy) > CLICK_PX * this.unitsPerPx) this.#isClick = false;
    if (this.#isClick) return;
    if (this.kind === "mark") {
      this.#mark(sample);
    } else {
      const place = { x: this.held.x + dx, y: this.held.y + dy };
      this.matrix = keptOnCanvas(this.#matrixTo(place, sample.hasShift === true), this.selection.bounds);
    }
  }

  finish() {
    const isMissed = this.kind === "mark" && this.#isClick && this.start.hasShift !== true;
    if (isMissed) this.selection.select([]);
    else this.selection.transform(this.matrix);
  }

  cancel() {
    if (this.kind === "mark") this.selection.select(this.selected);
  }

  /**
   * Selects the stroke that was pressed: alone, or with Shift in addition to the others.
   * @param {object | null} handle
   * @param {Stroke | null} stroke
   */
  #press(handle, stroke) {
    const { selection } = this;
    if (handle !== null || stroke === null) return;
    if (this.start.hasShift) selection.toggle(stroke);
    else if (!selection.strokes.includes(stroke)) selection.select([stroke]);
  }

  /** @param {Place} place @returns {boolean} whether the frame of the selection is around a place */
  #holds(place) {
    const frame = frameOf(this.selection.bounds, this.unitsPerPx);
    return frame !== null && place.x >= frame.left && place.x <= frame.right && place.y >= frame.top && place.y <= frame.bottom;
  }

  /** @param {Place} place @returns {Stroke | null} the nearest visible stroke within reach */
  #strokeAt(place) {
    let [nearest, least] = [/** @type {Stroke | null} */ (null), REACH_PX * this.unitsPerPx];
    for (const [stroke, parts] of this.parts) {
      const distance = Math.min(...parts.map((part) => distanceTo(part, place)));
      if (distance < least) [nearest, least] = [stroke, distance];
    }
    return nearest;
  }

  /** @param {PointerSample} end */
  #mark({ x, y }) {
    const { start } = this;
    const box = { left: Math.min(start.x, x), top: Math.min(start.y, y), right: Math.max(start.x, x), bottom: Math.max(start.y, y) };
    this.box = box;
    const marked = [...this.parts].filter(([, parts]) => parts.some((part) => enters(part, box))).map(([stroke]) => stroke);
    this.selection.select(start.hasShift ? [...new Set([...this.selected, ...marked])] : marked);
  }

  /** @param {Place} to @param {boolean} hasShift */
  #matrixTo(to, hasShift) {
    const { anchor, held } = this;
    if (this.kind === "move") return new DOMMatrix().translate(to.x - held.x, to.y - held.y);
    if (this.kind === "rotate") {
      const end = hasShift ? snapped(anchor, to, ANGLE_STEP_DEGREES) : to;
      const radians = Math.atan2(end.y - anchor.y, end.x - anchor.x) - Math.atan2(held.y - anchor.y, held.x - anchor.x);
      return rotation(anchor, (radians * 180) / Math.PI);
    }
    const factors = [(to.x - anchor.x) / (held.x - anchor.x), (to.y - anchor.y) / (held.y - anchor.y)];
    const [x, y] = factors.map((factor) => Math.max(MIN_FACTOR, factor));
    return hasShift ? scaling(anchor, x, y) : scaling(anchor, Math.max(x, y));
  }
}

/**
 * Returns the frame that is shown around a selection.
 * @param {Box | null} bounds
 * @param {number} unitsPerPx
 * @returns {Box | null}
 */
function frameOf(bounds, unitsPerPx) {
  if (bounds === null) return null;
  const padding = PADDING_PX * unitsPerPx;
  const { left, top, right, bottom } = bounds;
  return { left: left - padding, top: top - padding, right: right + padding, bottom: bottom + padding };
}

/**
 * Returns the handles of the frame around a selection: where they are, and what dragging them does. What is
 * `held` moves with the pointer, and the `anchor` stays.
 * @param {Box} bounds
 * @param {number} unitsPerPx
 * @returns {{ kind: DragKind, place: Place, held: Place, anchor: Place }[]} the handle for rotation first
 */
export function handlesOf(bounds, unitsPerPx) {
  const { left, top, right, bottom } = bounds;
  const centre = centreOf(bounds);
  const padding = PADDING_PX * unitsPerPx;
  const away = padding + ROTATE_HANDLE_PX * unitsPerPx;
  // Below the frame if there is no room above it.
  const turning = { x: centre.x, y: top - away > 0 ? top - away : bottom + away };
  return [
    { kind: "rotate", place: turning, held: turning, anchor: centre },
    ...[[left, top], [right, top], [right, bottom], [left, bottom]].map(([x, y]) => ({
      kind: /** @type {DragKind} */ ("scale"),
      place: { x: x + Math.sign(x - centre.x) * padding, y: y + Math.sign(y - centre.y) * padding },
      held: { x, y },
      anchor: { x: left + right - x, y: top + bottom - y },
    })),
  ];
}

/**
 * @param {Box | null} bounds
 * @param {Place} place
 * @param {number} unitsPerPx
 */
function handleAt(bounds, place, unitsPerPx) {
  if (bounds === null) return null;
  const isNear = (/** @type {{ place: Place }} */ { place: { x, y } }) => Math.hypot(x - place.x, y - place.y) < REACH_PX * unitsPerPx;
  return handlesOf(bounds, unitsPerPx).find(isNear) ?? null;
}

/**
 * Moves the result of a transform so that its centre stays on the canvas.
 * @param {DOMMatrix} matrix
 * @param {Box | null} bounds
 */
function keptOnCanvas(matrix, bounds) {
  if (bounds === null) return matrix;
  const { x, y } = matrix.transformPoint(centreOf(bounds));
  const within = (/** @type {number} */ length) => Math.min(CANVAS_UNITS, Math.max(0, length));
  return new DOMMatrix().translate(within(x) - x, within(y) - y).multiply(matrix);
}
