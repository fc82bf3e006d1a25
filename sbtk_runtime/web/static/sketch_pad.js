// The canvas on the screen, drawn on with a mouse, pen, finger or the keyboard.

import { shownAt, WHOLE } from "./canvas_view.js";
import { CANVAS_UNITS, ERASER_SCALE, LINE_WIDTHS, StrokeBuilder } from "./drawing.js";
import { handleKeys } from "./pad_keys.js";
import { drawCrosshair, drawRing, drawSelection } from "./pad_overlay.js";
import { handlePointers } from "./pad_pointers.js";
import { drawCurve, drawImage, drawMarks, drawStrokeEnd } from "./rendering.js";
import { Selection, SelectionDrag } from "./selection.js";
import { StrokeEraser } from "./stroke_eraser.js";

/** @typedef {import("./canvas_view.js").View} View */
/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./drawing.js").Mark} Mark */
/** @typedef {import("./drawing.js").PointerSample} PointerSample */
/** @typedef {import("./drawing.js").Tool} Tool */
/** @typedef {import("./drawing.js").Stroke} Stroke */

const INK_COLOUR = "#1d1c1a";
const MAX_PIXEL_RATIO = 3;
const STROKE_ERASER_REACH = 14;

/**
 * The canvas at the resolution of the screen. Dispatches "draw" while a stroke is being drawn, "cancel" when
 * it is discarded, and "view" when it is zoomed. A finished stroke is added to the drawing.
 */
export class SketchPad extends EventTarget {
  /** @type {number} in units */
  size = LINE_WIDTHS.medium;
  /** @type {Tool} */
  #tool = "pen";
  /** @type {View} */
  #view = WHOLE;
  /** @type {StrokeBuilder | null} */
  #builder = null;
  /** @type {StrokeEraser | SelectionDrag | null} */
  #edit = null;
  /** @type {readonly Mark[] | null} what is shown while strokes are being edited */
  #edited = null;
  #sidePx = 1;
  #shownPx = 1;

  /**
   * @param {{ traced: HTMLCanvasElement, strokes: HTMLCanvasElement, input: HTMLCanvasElement }} layers `traced`
   *     shows the image to trace, `strokes` the drawing, `input` the end of the stroke, frames and the cursor
   * @param {Drawing} drawing
   */
  constructor({ traced, strokes, input }, drawing) {
    super();
    this.drawing = drawing;
    this.element = input;
    this.tracedContext = contextOf(traced);
    this.strokesContext = contextOf(strokes);
    this.inputContext = contextOf(input);
    this.selection = new Selection(drawing);
    drawing.addEventListener("change", () => {
      this.#redraw();
      this.#clearInput();
    });
    this.selection.addEventListener("change", () => this.#clearInput());
    new ResizeObserver(() => this.#resize()).observe(input);
    window.addEventListener("resize", () => this.#resize());
    this.#resize();
    handlePointers(this);
    handleKeys(this);
  }

  get tool() {
    return this.#tool;
  }

  set tool(tool) {
    this.finish();
    this.#tool = tool;
    this.element.dataset.tool = tool;
    if (tool !== "select") this.selection.select([]);
    this.#clearInput();
  }

  get view() {
    return this.#view;
  }

  set view(view) {
    this.#view = view;
    this.#applyView();
    this.dispatchEvent(new Event("view"));
  }

  /** @returns {number} the length of a pixel of the page, in units */
  get unitsPerPx() {
    return CANVAS_UNITS / (this.#shownPx * this.#view.scale);
  }

  /** @returns {readonly Stroke[]} the stroke that is being drawn, if any */
  get unfinished() {
    return this.#builder === null ? [] : [this.#builder.stroke];
  }

  get isDrawing() {
    return this.#builder !== null;
  }

  /** @returns {boolean} whether a tool is in use */
  get isInUse() {
    return this.isDrawing || this.#edit !== null;
  }

  /**
   * Starts a stroke, or another use of a tool.
   * @param {PointerSample} sample
   * @param {Tool} [tool]
   */
  start(sample, tool = this.tool) {
    this.finish();
    if (tool === "select") {
      this.#edit = new SelectionDrag(this.selection, sample, this.unitsPerPx);
    } else if (tool === "stroke-eraser") {
      this.#edit = new StrokeEraser(this.drawing, STROKE_ERASER_REACH, sample);
      this.#showEdit(sample);
    } else {
      this.#builder = new StrokeBuilder(tool, this.size, sample);
      this.#drawTip(sample, []);
      this.dispatchEvent(new Event("draw"));
    }
  }

  /**
   * Extends the current stroke.
   * @param {readonly PointerSample[]} samples since the last call, oldest first
   * @param {readonly PointerSample[]} [predicted] where the pointer is expected next
   */
  extend(samples, predicted = []) {
    const last = samples[samples.length - 1];
    if (last === undefined) return;
    if (this.#edit !== null) {
      const edit = this.#edit;
      // Only the stroke eraser depends on the way there.
      for (const sample of edit instanceof StrokeEraser ? samples : [last]) edit.extend(sample);
      this.#showEdit(last);
    } else if (this.#builder !== null) {
      this.#extendStroke(this.#builder, samples);
      this.#drawTip(last, predicted);
    }
  }

  /** Finishes the current stroke, if any, and adds it to the drawing. */
  finish() {
    const [builder, edit] = [this.#builder, this.#edit];
    this.#builder = this.#edit = null;
    if (builder !== null) this.drawing.add(builder.finish());
    this.#showEdit(null);
    edit?.finish();
    this.#clearInput();
  }

  /** Discards the current stroke. */
  cancel() {
    const [builder, edit] = [this.#builder, this.#edit];
    this.#builder = this.#edit = null;
    if (edit instanceof SelectionDrag) edit.cancel();
    this.#showEdit(null);
    this.#clearInput();
    if (builder === null) return;
    this.#redraw();
    this.dispatchEvent(new Event("cancel"));
  }

  /**
   * Shows the eraser's outline or, with `isKeyboard`, the keyboard cursor. Hides both for null.
   * @param {{ x: number, y: number } | null} point
   * @param {{ isKeyboard?: boolean }} [options]
   */
  showCursor(point, { isKeyboard = false } = {}) {
    if (this.isInUse && !isKeyboard) return;
    this.#clearInput();
    if (point === null || this.tool === "select") return;
    const diameter = this.#ringDiameter();
    if (diameter > 0) drawRing(this.inputContext, point, diameter, this.unitsPerPx);
    if (isKeyboard) drawCrosshair(this.inputContext, point, this.unitsPerPx);
  }

  /**
   * Returns the place at a point of the window.
   * @param {{ clientX: number, clientY: number }} point
   */
  placeAt(point) {
    return shownAt(this.#view, this.sharesAt(point));
  }

  /**
   * Returns a point of the window in shares of the canvas on the screen.
   * @param {{ clientX: number, clientY: number }} point
   */
  sharesAt({ clientX, clientY }) {
    const box = this.element.getBoundingClientRect();
    return { x: (clientX - box.left) / box.width, y: (clientY - box.top) / box.height };
  }

  #ringDiameter() {
    if (this.tool === "eraser") return this.size * ERASER_SCALE;
    return this.tool === "stroke-eraser" ? 2 * STROKE_ERASER_REACH : 0;
  }

  /**
   * @param {StrokeBuilder} builder
   * @param {readonly PointerSample[]} samples
   */
  #extendStroke(builder, samples) {
    let isLonger = false;
    for (const sample of samples) {
      const wasStraight = builder.straight !== null;
      if (builder.add(sample)) {
        isLonger = true;
        if (wasStraight) this.#redraw();
        else drawCurve(this.strokesContext, builder.stroke, builder.stroke.points.length - 2, INK_COLOUR);
      }
    }
    if (isLonger || builder.straight !== null) this.dispatchEvent(new Event("draw"));
  }

  /**
   * Shows what the drawing becomes; null shows the drawing.
   * @param {PointerSample | null} sample
   */
  #showEdit(sample) {
    const shown = this.#edited;
    const marks = this.#edit?.marks ?? null;
    this.#edited = marks === this.#edit?.before ? null : marks;
    if (this.#edited !== shown) this.#redraw();
    this.#clearInput();
    if (sample !== null && this.#edit instanceof StrokeEraser) {
      drawRing(this.inputContext, sample, 2 * STROKE_ERASER_REACH, this.unitsPerPx);
    }
  }

  #resize() {
    this.#shownPx = Math.max(1, this.element.getBoundingClientRect().width);
    const ratio = Math.min(MAX_PIXEL_RATIO, window.devicePixelRatio || 1);
    const sidePx = Math.max(1, Math.round(this.#shownPx * ratio));
    if (sidePx === this.#sidePx) return;
    this.#sidePx = sidePx;
    for (const context of [this.tracedContext, this.strokesContext, this.inputContext]) {
      context.canvas.width = context.canvas.height = sidePx;
    }
    this.#applyView();
  }

  #applyView() {
    const { scale, x, y } = this.#view;
    const pxPerUnit = (this.#sidePx / CANVAS_UNITS) * scale;
    for (const context of [this.tracedContext, this.strokesContext, this.inputContext]) {
      context.setTransform(pxPerUnit, 0, 0, pxPerUnit, -x * pxPerUnit, -y * pxPerUnit);
    }
    this.#redraw();
    this.#clearInput();
  }

  #redraw() {
    this.#redrawTraced();
    this.strokesContext.clearRect(0, 0, CANVAS_UNITS, CANVAS_UNITS);
    const marks = this.#edited ?? this.drawing.visible;
    drawMarks(this.strokesContext, [...marks, ...this.unfinished], INK_COLOUR);
  }

  #redrawTraced() {
    const { traced } = this.drawing;
    if (traced === null && this.tracedContext.canvas.hidden) return;
    this.tracedContext.canvas.hidden = traced === null;
    this.tracedContext.clearRect(0, 0, CANVAS_UNITS, CANVAS_UNITS);
    if (traced !== null) drawImage(this.tracedContext, traced);
  }

  /**
   * Draws the end of the current stroke, which moves until the next point is known.
   * @param {PointerSample} sample
   * @param {readonly PointerSample[]} predicted
   */
  #drawTip(sample, predicted) {
    const builder = this.#builder;
    if (builder === null) return;
    this.#clearInput();
    const { stroke, straight } = builder;
    if (builder.isEraser) {
      drawStrokeEnd(this.strokesContext, stroke, INK_COLOUR);
      drawRing(this.inputContext, sample, builder.size, this.unitsPerPx);
    } else if (straight !== null) {
      drawMarks(this.inputContext, [straight], INK_COLOUR);
    } else {
      const width = stroke.points[stroke.points.length - 1].width;
      const points = [sample, ...predicted].map(({ x, y }) => ({ x, y, width }));
      drawStrokeEnd(this.inputContext, stroke, INK_COLOUR, points);
    }
  }

  /** Clears the input layer, except for the frame of the selection. */
  #clearInput() {
    this.inputContext.clearRect(0, 0, CANVAS_UNITS, CANVAS_UNITS);
    const drag = this.#edit instanceof SelectionDrag ? this.#edit : null;
    drawSelection(this.inputContext, this.selection, drag, this.unitsPerPx);
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
