// The canvas on the screen, drawn on with a mouse, pen, finger or the keyboard.

import { announce } from "./dom.js";
import { CANVAS_UNITS, ERASER_SCALE, LINE_WIDTHS, StrokeBuilder } from "./drawing.js";
import { drawCurve, drawMarks, drawStrokeEnd } from "./rendering.js";

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./drawing.js").PointerSample} PointerSample */
/** @typedef {import("./drawing.js").Tool} Tool */
/** @typedef {import("./drawing.js").Stroke} Stroke */

const INK_COLOUR = "#1d1c1a";
const ERASER_COLOUR = "#8d877c";
const CURSOR_COLOUR = "#b34c12";
const MAX_PIXEL_RATIO = 3;
const ERASER_BUTTON = 5;
// Touches this soon after pen input are taken for the palm of the hand.
const PALM_MS = 1000;
const KEY_STEP = 20;
const LARGE_KEY_STEP = 100;
/** @type {Record<string, [number, number]>} */
const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * The canvas at the resolution of the screen. Dispatches "draw" while a stroke is being drawn and "cancel"
 * when it is discarded. A finished stroke is added to the drawing.
 */
export class SketchPad extends EventTarget {
  /** @type {Tool} */
  tool = "pen";
  /** @type {number} in units */
  size = LINE_WIDTHS.medium;
  /** @type {StrokeBuilder | null} */
  #builder = null;
  #sidePx = 1;

  /**
   * @param {HTMLCanvasElement} strokesLayer shows the drawing
   * @param {HTMLCanvasElement} inputLayer shows the end of the current stroke and the cursor
   * @param {Drawing} drawing
   */
  constructor(strokesLayer, inputLayer, drawing) {
    super();
    this.drawing = drawing;
    this.element = inputLayer;
    this.strokesContext = contextOf(strokesLayer);
    this.inputContext = contextOf(inputLayer);
    drawing.addEventListener("change", () => this.#redraw());
    new ResizeObserver(() => this.#resize()).observe(inputLayer);
    window.addEventListener("resize", () => this.#resize());
    this.#resize();
    handlePointers(this);
    handleKeys(this);
  }

  /** @returns {readonly Stroke[]} the stroke that is being drawn, if any */
  get unfinished() {
    return this.#builder === null ? [] : [this.#builder.stroke];
  }

  get isDrawing() {
    return this.#builder !== null;
  }

  /**
   * Starts a stroke.
   * @param {PointerSample} sample
   * @param {Tool} [tool]
   */
  start(sample, tool = this.tool) {
    this.finish();
    this.#builder = new StrokeBuilder(tool, this.size, sample);
    this.#drawTip(sample, []);
    this.dispatchEvent(new Event("draw"));
  }

  /**
   * Extends the current stroke.
   * @param {readonly PointerSample[]} samples since the last call, oldest first
   * @param {readonly PointerSample[]} [predicted] where the pointer is expected next
   */
  extend(samples, predicted = []) {
    const builder = this.#builder;
    if (builder === null) return;
    let isLonger = false;
    for (const sample of samples) {
      if (builder.add(sample)) {
        isLonger = true;
        drawCurve(this.strokesContext, builder.stroke, builder.stroke.points.length - 2, INK_COLOUR);
      }
    }
    const last = samples[samples.length - 1];
    if (last !== undefined) this.#drawTip(last, predicted);
    if (isLonger) this.dispatchEvent(new Event("draw"));
  }

  /** Finishes the current stroke, if any, and adds it to the drawing. */
  finish() {
    if (this.#builder === null) return;
    const stroke = this.#builder.finish();
    this.#builder = null;
    this.#clearInput();
    this.drawing.add(stroke);
  }

  /** Discards the current stroke. */
  cancel() {
    if (this.#builder === null) return;
    this.#builder = null;
    this.#clearInput();
    this.#redraw();
    this.dispatchEvent(new Event("cancel"));
  }

  /**
   * Shows the eraser's outline or, with `isKeyboard`, the keyboard cursor. Hides both for null.
   * @param {{ x: number, y: number } | null} point
   * @param {{ isKeyboard?: boolean }} [options]
   */
  showCursor(point, { isKeyboard = false } = {}) {
    if (this.isDrawing && !isKeyboard) return;
    this.#clearInput();
    if (point === null) return;
    if (this.tool === "eraser") this.#drawRing(point, this.size * ERASER_SCALE);
    if (isKeyboard) this.#drawCrosshair(point);
  }

  #resize() {
    const shownPx = this.element.getBoundingClientRect().width;
    const sidePx = Math.max(1, Math.round(shownPx * Math.min(MAX_PIXEL_RATIO, window.devicePixelRatio || 1)));
    if (sidePx === this.#sidePx) return;
    this.#sidePx = sidePx;
    for (const context of [this.strokesContext, this.inputContext]) {
      context.canvas.width = context.canvas.height = sidePx;
      context.setTransform(sidePx / CANVAS_UNITS, 0, 0, sidePx / CANVAS_UNITS, 0, 0);
    }
    this.#redraw();
  }

  #redraw() {
    this.strokesContext.clearRect(0, 0, CANVAS_UNITS, CANVAS_UNITS);
    drawMarks(this.strokesContext, [...this.drawing.visible, ...this.unfinished], INK_COLOUR);
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
    if (builder.tool === "eraser") {
      drawStrokeEnd(this.strokesContext, builder.stroke, INK_COLOUR);
      this.#drawRing(sample, builder.size);
      return;
    }
    const width = builder.stroke.points[builder.stroke.points.length - 1].width;
    const points = [sample, ...predicted].map(({ x, y }) => ({ x, y, width }));
    drawStrokeEnd(this.inputContext, builder.stroke, INK_COLOUR, points);
  }

  #clearInput() {
    this.inputContext.clearRect(0, 0, CANVAS_UNITS, CANVAS_UNITS);
  }

  /**
   * @param {{ x: number, y: number }} centre
   * @param {number} diameter
   */
  #drawRing(centre, diameter) {
    this.inputContext.strokeStyle = ERASER_COLOUR;
    this.inputContext.lineWidth = 2;
    this.inputContext.beginPath();
    this.inputContext.arc(centre.x, centre.y, diameter / 2, 0, 2 * Math.PI);
    this.inputContext.stroke();
  }

  /** @param {{ x: number, y: number }} centre */
  #drawCrosshair({ x, y }) {
    this.inputContext.strokeStyle = CURSOR_COLOUR;
    this.inputContext.lineWidth = 3;
    this.inputContext.beginPath();
    for (const [dx, dy] of Object.values(DIRECTIONS)) {
      this.inputContext.moveTo(x + 8 * dx, y + 8 * dy);
      this.inputContext.lineTo(x + 26 * dx, y + 26 * dy);
    }
    this.inputContext.stroke();
  }
}

/**
 * Draws with pointers, one at a time. Two fingers zoom the page, and a pen interrupts a finger.
 * @param {SketchPad} pad
 */
function handlePointers(pad) {
  const element = pad.element;
  /** @type {PointerEvent | null} */
  let active = null;
  let penSeenMs = -Infinity;

  element.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "pen") penSeenMs = event.timeStamp;
    if (!mayDraw(event, active, penSeenMs)) return;
    if (active !== null) pad.cancel();
    active = event;
    element.setPointerCapture(event.pointerId);
    // The other end of some pens is an eraser.
    pad.start(sampleFrom(element, event), event.button === ERASER_BUTTON ? "eraser" : pad.tool);
  });

  element.addEventListener("pointermove", (event) => {
    if (event.pointerType === "pen") penSeenMs = event.timeStamp;
    if (event.pointerId === active?.pointerId) {
      const samples = coalescedEvents(event).map((part) => sampleFrom(element, part));
      const predicted = event.getPredictedEvents?.() ?? [];
      pad.extend(samples, predicted.slice(0, 1).map((part) => sampleFrom(element, part)));
    } else if (event.pointerType !== "touch") {
      pad.showCursor(sampleFrom(element, event));
    }
  });

  element.addEventListener("pointerup", (event) => {
    if (event.pointerId !== active?.pointerId) return;
    active = null;
    pad.extend([sampleFrom(element, event)]);
    pad.finish();
  });

  element.addEventListener("pointercancel", (event) => {
    if (event.pointerId !== active?.pointerId) return;
    active = null;
    // Touches are cancelled when they become a scroll or zoom gesture.
    if (event.pointerType === "touch") pad.cancel();
    else pad.finish();
  });

  element.addEventListener("pointerleave", () => pad.showCursor(null));
  element.addEventListener("contextmenu", (event) => event.preventDefault());
}

/**
 * @param {PointerEvent} event
 * @param {PointerEvent | null} active the pointer that is already drawing
 * @param {number} penSeenMs
 */
function mayDraw(event, active, penSeenMs) {
  if (event.button !== 0 && event.button !== ERASER_BUTTON) return false;
  if (event.pointerType === "touch" && event.timeStamp - penSeenMs < PALM_MS) return false;
  if (active !== null) return event.pointerType === "pen" && active.pointerType === "touch";
  return event.isPrimary;
}

/**
 * Returns the events since the last frame.
 * @param {PointerEvent} event
 * @returns {PointerEvent[]}
 */
function coalescedEvents(event) {
  const parts = event.getCoalescedEvents?.() ?? [];
  return parts.length > 0 ? parts : [event];
}

/**
 * @param {Element} element
 * @param {PointerEvent} event
 * @returns {PointerSample}
 */
function sampleFrom(element, event) {
  const box = element.getBoundingClientRect();
  return {
    x: ((event.clientX - box.left) / box.width) * CANVAS_UNITS,
    y: ((event.clientY - box.top) / box.height) * CANVAS_UNITS,
    pressure: event.pointerType === "pen" && event.pressure > 0 ? event.pressure : null,
    timeMs: event.timeStamp,
  };
}

/**
 * Draws with the keyboard while the canvas has the focus: arrows move the pen, the space bar lowers or
 * lifts it.
 * @param {SketchPad} pad
 */
function handleKeys(pad) {
  const pen = { x: CANVAS_UNITS / 2, y: CANVAS_UNITS / 2 };
  let isDown = false;

  const sample = () => ({ ...pen, pressure: null, timeMs: performance.now() });
  const showPen = () => pad.showCursor(pen, { isKeyboard: true });
  const lift = () => {
    if (isDown) pad.finish();
    isDown = false;
  };

  pad.element.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const direction = DIRECTIONS[event.key];
    if (direction !== undefined) {
      const step = event.shiftKey ? LARGE_KEY_STEP : KEY_STEP;
      pen.x = Math.min(CANVAS_UNITS, Math.max(0, pen.x + direction[0] * step));
      pen.y = Math.min(CANVAS_UNITS, Math.max(0, pen.y + direction[1] * step));
      if (isDown) pad.extend([sample()]);
    } else if (event.key === " ") {
      if (isDown) {
        lift();
      } else {
        isDown = true;
        pad.start(sample());
      }
      announce(`Pen ${isDown ? "down" : "up"} at ${percent(pen.x)} across, ${percent(pen.y)} down.`);
    } else if (event.key === "Escape" && isDown) {
      lift();
      announce("Pen up.");
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
    showPen();
  });

  pad.element.addEventListener("focus", () => {
    if (pad.element.matches(":focus-visible")) showPen();
  });
  pad.element.addEventListener("blur", () => {
    lift();
    pad.showCursor(null);
  });
  pad.element.addEventListener("pointerdown", () => {
    isDown = false;
  });
}

/** @param {number} length */
function percent(length) {
  return `${Math.round((length / CANVAS_UNITS) * 100)} percent`;
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
