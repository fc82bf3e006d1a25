// Strokes and pictures as pixels. The contexts given here are scaled to units of the paper.

import { SIDE } from "./strokes.js";

/** @typedef {import("./strokes.js").Point} Point */
/** @typedef {import("./strokes.js").Stroke} Stroke */
/** @typedef {import("./drawing.js").Mark} Mark */
/** @typedef {{ from: Point, bend: Point, to: Point, width: number }} Curve */
/** @typedef {CanvasRenderingContext2D | OffscreenCanvasRenderingContext2D} Context */

// Widths, in units, that nobody can tell apart.
const ALIKE = 0.6;

/**
 * Paints marks on a transparent ground, in their order.
 * @param {Context} context
 * @param {readonly Mark[]} marks
 * @param {string} colour
 */
export function paintMarks(context, marks, colour) {
  for (const mark of marks) {
    if (mark.kind === "stroke") {
      paintStroke(context, mark, colour);
    } else if (mark.kind === "picture") {
      const { x, y, width, height } = placeOf(mark.picture);
      context.drawImage(mark.picture.pixels, x, y, width, height);
    }
  }
}

/**
 * @param {Context} context
 * @param {Stroke} stroke
 * @param {string} colour
 */
export function paintStroke(context, stroke, colour) {
  const curves = stroke.points.slice(0, -1).map((_, index) => curveAround(stroke, index));
  take(context, stroke, colour);
  // Curves of hardly different widths are painted at once: that is many times faster.
  for (let index = 0; index < curves.length; ) {
    const width = curves[index].width;
    let end = index + 1;
    while (end < curves.length && Math.abs(curves[end].width - width) < ALIKE) end += 1;
    paintCurves(context, curves.slice(index, end));
    index = end;
  }
  leave(context);
  paintEnd(context, stroke, colour);
}

/**
 * Paints the curve around point `index`. Point `index + 1` must be there.
 * @param {Context} context
 * @param {Stroke} stroke
 * @param {number} index
 * @param {string} colour
 */
export function paintCurve(context, stroke, index, colour) {
  take(context, stroke, colour);
  paintCurves(context, [curveAround(stroke, index)]);
  leave(context);
}

/**
 * Paints what lies behind the last curve: up to the last point, and further to `ahead`.
 * @param {Context} context
 * @param {Stroke} stroke
 * @param {string} colour
 * @param {readonly Point[]} [ahead]
 */
export function paintEnd(context, stroke, colour, ahead = []) {
  const points = stroke.points;
  const last = points[points.length - 1];
  const from = points.length === 1 ? last : between(points[points.length - 2], last);
  take(context, stroke, colour);
  context.lineWidth = last.width;
  context.beginPath();
  if (points.length === 1) {
    // A line of no length would leave nothing.
    context.arc(last.x, last.y, last.width / 2, 0, 2 * Math.PI);
    context.fill();
    context.beginPath();
  }
  context.moveTo(from.x, from.y);
  for (const point of [last, ...ahead]) context.lineTo(point.x, point.y);
  context.stroke();
  leave(context);
}

/**
 * Where a picture lies on the paper: all of it, in the middle.
 * @param {{ width: number, height: number }} picture
 * @returns {{ x: number, y: number, width: number, height: number }} in units
 */
export function placeOf(picture) {
  const scale = SIDE / Math.max(picture.width, picture.height);
  const width = picture.width * scale;
  const height = picture.height * scale;
  return { x: (SIDE - width) / 2, y: (SIDE - height) / 2, width, height };
}

/**
 * The curve around point `index`: from the middle of the way to it to the middle of the way from it,
 * so that neighbours meet smoothly.
 * @param {Stroke} stroke
 * @param {number} index
 * @returns {Curve}
 */
function curveAround(stroke, index) {
  const bend = stroke.points[index];
  const from = index === 0 ? bend : between(stroke.points[index - 1], bend);
  const to = between(bend, stroke.points[index + 1]);
  return { from, bend, to, width: (from.width + to.width) / 2 };
}

/**
 * @param {Context} context
 * @param {readonly Curve[]} curves each beginning where the one before ends
 */
function paintCurves(context, curves) {
  const [first] = curves;
  if (curves.length === 1 && Math.abs(first.to.width - first.from.width) > 2 * ALIKE) {
    paintPieces(context, first);
    return;
  }
  context.lineWidth = curves.reduce((sum, { width }) => sum + width, 0) / curves.length;
  context.beginPath();
  context.moveTo(first.from.x, first.from.y);
  for (const { bend, to } of curves) context.quadraticCurveTo(bend.x, bend.y, to.x, to.y);
  context.stroke();
}

/**
 * Paints a curve along which the width changes.
 * @param {Context} context
 * @param {Curve} curve
 */
function paintPieces(context, { from, bend, to }) {
  const pieces = Math.min(16, Math.ceil(Math.abs(to.width - from.width) / ALIKE));
  let { x, y } = from;
  for (let piece = 1; piece <= pieces; piece += 1) {
    const t = piece / pieces;
    const nextX = (1 - t) ** 2 * from.x + 2 * (1 - t) * t * bend.x + t ** 2 * to.x;
    const nextY = (1 - t) ** 2 * from.y + 2 * (1 - t) * t * bend.y + t ** 2 * to.y;
    context.lineWidth = from.width + (to.width - from.width) * (t - 0.5 / pieces);
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(nextX, nextY);
    context.stroke();
    x = nextX;
    y = nextY;
  }
}

/**
 * @param {Context} context
 * @param {Stroke} stroke
 * @param {string} colour
 */
function take(context, stroke, colour) {
  context.globalCompositeOperation = stroke.tool === "eraser" ? "destination-out" : "source-over";
  context.strokeStyle = context.fillStyle = colour;
  context.lineCap = "round";
  context.lineJoin = "round";
}

/** @param {Context} context */
function leave(context) {
  context.globalCompositeOperation = "source-over";
}

/**
 * @param {Point} a
 * @param {Point} b
 * @returns {Point}
 */
function between(a, b) {
  return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, width: (a.width + b.width) / 2 };
}
