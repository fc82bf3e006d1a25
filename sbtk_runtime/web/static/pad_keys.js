// The keyboard on the canvas: arrows move the pen or the selected strokes.

import { showing } from "./canvas_view.js";
import { announce } from "./dom.js";
import { CANVAS_UNITS } from "./drawing.js";
import { centreOf } from "./stroke_geometry.js";

/** @typedef {import("./sketch_pad.js").SketchPad} SketchPad */

const KEY_STEP = 20;
const LARGE_KEY_STEP = 100;
const ANGLE_STEP_DEGREES = 15;
const SCALE_STEP = 1.1;
/** @type {Record<string, [number, number]>} */
const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * Uses the tools with the keyboard while the canvas has the focus.
 * @param {SketchPad} pad
 */
export function handleKeys(pad) {
  const pressForPen = keysOfPen(pad);
  pad.element.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isHandled = pad.tool === "select" ? pressForSelection(pad, event) : pressForPen(event);
    if (!isHandled) return;
    event.preventDefault();
    event.stopPropagation();
  });
}

/**
 * Lets arrows move the pen, and the space bar lower or lift it.
 * @param {SketchPad} pad
 * @returns {(event: KeyboardEvent) => boolean} returns whether the key means something
 */
function keysOfPen(pad) {
  const pen = { x: CANVAS_UNITS / 2, y: CANVAS_UNITS / 2 };
  let isDown = false;

  const sample = () => ({ ...pen, pressure: null, timeMs: performance.now() });
  const showPen = () => pad.showCursor(pen, { isKeyboard: true });
  const lift = () => {
    if (isDown) pad.finish();
    isDown = false;
  };

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

  return (event) => {
    // Another tool may have been chosen, which ends the stroke.
    isDown &&= pad.isInUse;
    const direction = DIRECTIONS[event.key];
    if (direction !== undefined) {
      const step = event.shiftKey ? LARGE_KEY_STEP : KEY_STEP;
      pen.x = Math.min(CANVAS_UNITS, Math.max(0, pen.x + direction[0] * step));
      pen.y = Math.min(CANVAS_UNITS, Math.max(0, pen.y + direction[1] * step));
      if (isDown) pad.extend([sample()]);
      if (pad.view.scale > 1) pad.view = showing(pad.view, pen);
    } else if (event.key === " ") {
      if (isDown) {
        lift();
      } else {
        isDown = true;
        pad.start(sample());
      }
      announce(`Pen ${isDown ? "down" : "up"} at ${positionText(pen)}.`);
    } else if (event.key === "Escape" && isDown) {
      lift();
      announce("Pen up.");
    } else {
      return false;
    }
    showPen();
    return true;
  };
}

/**
 * Lets Page Up and Page Down select strokes, and other keys transform them.
 * @param {SketchPad} pad
 * @param {KeyboardEvent} event
 * @returns {boolean} whether the key means something
 */
function pressForSelection({ selection }, { key, shiftKey }) {
  if (key === "PageDown" || key === "PageUp") {
    selection.selectNext(key === "PageDown" ? 1 : -1);
    return true;
  }
  if (selection.strokes.length === 0) return DIRECTIONS[key] !== undefined;
  const direction = DIRECTIONS[key];
  const step = shiftKey ? LARGE_KEY_STEP : KEY_STEP;
  if (direction !== undefined) {
    selection.move(direction[0] * step, direction[1] * step);
    const { bounds } = selection;
    if (bounds !== null) announce(`At ${positionText(centreOf(bounds))}.`);
  } else if (key === "," || key === ".") selection.rotate(key === "." ? ANGLE_STEP_DEGREES : -ANGLE_STEP_DEGREES);
  else if (key === "<" || key === ">") selection.scale(key === ">" ? SCALE_STEP : 1 / SCALE_STEP);
  else if (key === "Escape") selection.select([]);
  else return false;
  return true;
}

/** @param {{ x: number, y: number }} place */
function positionText({ x, y }) {
  const percent = (/** @type {number} */ length) => `${Math.round((length / CANVAS_UNITS) * 100)} percent`;
  return `${percent(x)} across, ${percent(y)} down`;
}
