// What the canvas shows above the drawing: the eraser's outline, the keyboard cursor, the frame of the selection.

import { handlesOf } from "./selection.js";

/** @typedef {import("./selection.js").Selection} Selection */
/** @typedef {import("./selection.js").SelectionDrag} SelectionDrag */
/** @typedef {import("./stroke_geometry.js").Place} Place */

const ERASER_COLOUR = "#8d877c";
const CURSOR_COLOUR = "#b34c12";
const HANDLE_COLOUR = "#ffffff";
// Lengths on the screen, in pixels.
const LINE_PX = 1.5;
const HANDLE_PX = 5.5;
const DASH_PX = 5;

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Place} centre
 * @param {number} diameter in units
 * @param {number} unitsPerPx
 */
export function drawRing(context, centre, diameter, unitsPerPx) {
  context.strokeStyle = ERASER_COLOUR;
  context.lineWidth = LINE_PX * unitsPerPx;
  context.beginPath();
  context.arc(centre.x, centre.y, diameter / 2, 0, 2 * Math.PI);
  context.stroke();
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Place} centre
 * @param {number} unitsPerPx
 */
export function drawCrosshair(context, { x, y }, unitsPerPx) {
  context.strokeStyle = CURSOR_COLOUR;
  context.lineWidth = LINE_PX * unitsPerPx;
  context.beginPath();
  for (const [dx, dy] of [[-1, 0], [1, 0], [0, -1], [0, 1]]) {
    context.moveTo(x + 5 * dx * unitsPerPx, y + 5 * dy * unitsPerPx);
    context.lineTo(x + 15 * dx * unitsPerPx, y + 15 * dy * unitsPerPx);
  }
  context.stroke();
}

/**
 * Draws the frame of the selection with its handles, and the box that marks strokes.
 * @param {CanvasRenderingContext2D} context
 * @param {Selection} selection
 * @param {SelectionDrag | null} drag
 * @param {number} unitsPerPx
 */
export function drawSelection(context, selection, drag, unitsPerPx) {
  context.strokeStyle = CURSOR_COLOUR;
  context.fillStyle = HANDLE_COLOUR;
  context.lineWidth = LINE_PX * unitsPerPx;
  if (drag?.box) {
    const { left, top, right, bottom } = drag.box;
    context.setLineDash([DASH_PX * unitsPerPx, DASH_PX * unitsPerPx]);
    context.strokeRect(left, top, right - left, bottom - top);
    context.setLineDash([]);
  }
  const { bounds } = selection;
  if (bounds === null) return;
  const handles = handlesOf(bounds, unitsPerPx);
  const [rotate, ...corners] = handles.map(({ place }) => drag?.matrix.transformPoint(place) ?? place);
  context.beginPath();
  corners.forEach(({ x, y }) => context.lineTo(x, y));
  context.closePath();
  const [start, end] = handles[0].place.y < bounds.top ? [corners[0], corners[1]] : [corners[3], corners[2]];
  context.moveTo((start.x + end.x) / 2, (start.y + end.y) / 2);
  context.lineTo(rotate.x, rotate.y);
  context.stroke();
  for (const { x, y } of [rotate, ...corners]) {
    context.beginPath();
    context.arc(x, y, HANDLE_PX * unitsPerPx, 0, 2 * Math.PI);
    context.fill();
    context.stroke();
  }
}
