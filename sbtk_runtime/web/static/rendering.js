// Rendering of strokes and images: on the screen, and as the image that is sent to the server.
// Contexts are scaled to canvas units.

import { CANVAS_UNITS } from "./drawing.js";

/** @typedef {import("./drawing.js").Point} Point */
/** @typedef {import("./drawing.js").Stroke} Stroke */
/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./drawing.js").Mark} Mark */
/** @typedef {{ from: Point, control: Point, to: Point, width: number }} Curve */
/** @typedef {CanvasRenderingContext2D | OffscreenCanvasRenderingContext2D} Context */

// Curves whose widths differ by less, in units, are drawn as one path.
const WIDTH_TOLERANCE = 0.6;
// The side grows in steps: what has not changed is then rendered as before when another stroke moves a little.
const MIN_SIDE_PX = 512;
const MAX_SIDE_PX = 1024;
const SIDE_STEP_PX = 128;
// For most models, the server crops a sketch to its strokes. Small drawings are rendered larger, so that
// lines stay sharp.
const MIN_EXTENT_PX = 320;
// The server treats lighter pixels as background.
const BACKGROUND_LEVEL = 255 - 24;

/**
 * Draws marks in their order on a transparent background, without an image that is traced.
 * @param {Context} context
 * @param {readonly Mark[]} marks
 * @param {string} colour
 */
export function drawMarks(context, marks, colour) {
  for (const mark of marks) {
    if (mark.kind === "stroke") {
      drawStroke(context, mark, colour);
    } else if (!mark.isTraced) {
      drawImage(context, mark.image);
    }
  }
}

/**
 * Draws an image over the whole canvas.
 * @param {Context} context
 * @param {import("./upload.js").UploadedImage} image
 */
export function drawImage(context, image) {
  const { x, y, width, height } = imageBox(image);
  context.drawImage(image.pixels, x, y, width, height);
}

/**
 * @param {Context} context
 * @param {Stroke} stroke
 * @param {string} colour
 */
function drawStroke(context, stroke, colour) {
  const curves = stroke.points.slice(0, -1).map((_, index) => curveAt(stroke, index));
  applyStyle(context, stroke, colour);
  // One path for curves of nearly the same width is many times faster.
  for (let index = 0; index < curves.length; ) {
    const width = curves[index].width;
    let end = index + 1;
    while (end < curves.length && Math.abs(curves[end].width - width) < WIDTH_TOLERANCE) end += 1;
    drawCurves(context, curves.slice(index, end));
    index = end;
  }
  resetStyle(context);
  drawStrokeEnd(context, stroke, colour);
}

/**
 * Draws the curve at point `index`. Point `index + 1` must exist.
 * @param {Context} context
 * @param {Stroke} stroke
 * @param {number} index
 * @param {string} colour
 */
export function drawCurve(context, stroke, index, colour) {
  applyStyle(context, stroke, colour);
  drawCurves(context, [curveAt(stroke, index)]);
  resetStyle(context);
}

/**
 * Draws the line from the last curve to the last point, and on to the `predicted` points.
 * @param {Context} context
 * @param {Stroke} stroke
 * @param {string} colour
 * @param {readonly Point[]} [predicted]
 */
export function drawStrokeEnd(context, stroke, colour, predicted = []) {
  const points = stroke.points;
  const last = points[points.length - 1];
  const from = points.length === 1 ? last : midpoint(points[points.length - 2], last);
  applyStyle(context, stroke, colour);
  context.lineWidth = last.width;
  context.beginPath();
  if (points.length === 1) {
    // A line of length 0 draws nothing.
    context.arc(last.x, last.y, last.width / 2, 0, 2 * Math.PI);
    context.fill();
    context.beginPath();
  }
  context.moveTo(from.x, from.y);
  for (const point of [last, ...predicted]) context.lineTo(point.x, point.y);
  context.stroke();
  resetStyle(context);
}

/**
 * Renders the drawing as an image file for the server: an image without strokes as it was uploaded,
 * everything else as a PNG of the whole canvas, dark on white. An image that is traced is left out.
 * @param {Drawing} drawing
 * @param {readonly Mark[]} [unfinished] strokes that are being drawn
 * @returns {Promise<Blob | null>} null if the canvas is blank
 */
export async function renderImage(drawing, unfinished = []) {
  if (unfinished.length === 0 && drawing.unmarkedImage !== null) return drawing.unmarkedImage.file;
  const marks = [...drawing.visible, ...unfinished].filter((mark) => mark.kind === "stroke" || !mark.isTraced);
  if (!marks.some((mark) => mark.kind === "image" || (mark.kind === "stroke" && mark.tool === "pen"))) {
    return null;
  }
  const canvas = renderMarks(marks);
  const isErased = marks.some((mark) => mark.kind === "stroke" && mark.tool === "eraser");
  if (isErased && isBlank(canvas)) return null;
  return canvas.convertToBlob({ type: "image/png" });
}

/**
 * @param {readonly Mark[]} marks
 * @returns {OffscreenCanvas}
 */
function renderMarks(marks) {
  const neededPx = (MIN_EXTENT_PX / extent(marks)) * CANVAS_UNITS;
  const sidePx = Math.min(MAX_SIDE_PX, Math.max(MIN_SIDE_PX, SIDE_STEP_PX * Math.ceil(neededPx / SIDE_STEP_PX)));
  const canvas = new OffscreenCanvas(sidePx, sidePx);
  const context = contextOf(canvas);
  context.scale(sidePx / CANVAS_UNITS, sidePx / CANVAS_UNITS);
  drawMarks(context, marks, "#000");
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, CANVAS_UNITS, CANVAS_UNITS);
  return canvas;
}

/**
 * Returns the longer side of the bounding box of the marks, in units.
 * @param {readonly Mark[]} marks
 * @returns {number}
 */
function extent(marks) {
  let [left, right, top, bottom] = [CANVAS_UNITS, 0, CANVAS_UNITS, 0];
  for (const mark of marks) {
    if (mark.kind === "image") {
      const box = imageBox(mark.image);
      return Math.max(box.width, box.height);
    }
    if (mark.kind !== "stroke" || mark.tool !== "pen") continue;
    for (const { x, y, width } of mark.points) {
      left = Math.min(left, x - width / 2);
      right = Math.max(right, x + width / 2);
      top = Math.min(top, y - width / 2);
      bottom = Math.max(bottom, y + width / 2);
    }
  }
  return Math.max(1, right - left, bottom - top);
}

/**
 * Returns the box of an image that is centred on the canvas and scaled to fit.
 * @param {{ width: number, height: number }} image
 * @returns {{ x: number, y: number, width: number, height: number }} in units
 */
function imageBox(image) {
  const scale = CANVAS_UNITS / Math.max(image.width, image.height);
  const width = image.width * scale;
  const height = image.height * scale;
  return { x: (CANVAS_UNITS - width) / 2, y: (CANVAS_UNITS - height) / 2, width, height };
}

/**
 * @param {OffscreenCanvas} canvas
 * @returns {boolean}
 */
function isBlank(canvas) {
  const { data } = contextOf(canvas).getImageData(0, 0, canvas.width, canvas.height);
  for (let index = 0; index < data.length; index += 4) {
    const darkest = Math.min(data[index], data[index + 1], data[index + 2]);
    if (darkest < BACKGROUND_LEVEL) return false;
  }
  return true;
}

/**
 * Returns the curve at point `index`, from the midpoint before it to the midpoint after it, so that
 * adjacent curves join smoothly.
 * @param {Stroke} stroke
 * @param {number} index
 * @returns {Curve}
 */
function curveAt(stroke, index) {
  const control = stroke.points[index];
  const from = index === 0 ? control : midpoint(stroke.points[index - 1], control);
  const to = midpoint(control, stroke.points[index + 1]);
  return { from, control, to, width: (from.width + to.width) / 2 };
}

/**
 * @param {Context} context
 * @param {readonly Curve[]} curves each starts where the previous one ends
 */
function drawCurves(context, curves) {
  const [first] = curves;
  if (curves.length === 1 && Math.abs(first.to.width - first.from.width) > 2 * WIDTH_TOLERANCE) {
    drawTaperedCurve(context, first);
    return;
  }
  context.lineWidth = curves.reduce((sum, { width }) => sum + width, 0) / curves.length;
  context.beginPath();
  context.moveTo(first.from.x, first.from.y);
  for (const { control, to } of curves) context.quadraticCurveTo(control.x, control.y, to.x, to.y);
  context.stroke();
}

/**
 * Draws a curve of varying width as short lines.
 * @param {Context} context
 * @param {Curve} curve
 */
function drawTaperedCurve(context, { from, control, to }) {
  const segments = Math.min(16, Math.ceil(Math.abs(to.width - from.width) / WIDTH_TOLERANCE));
  let { x, y } = from;
  for (let segment = 1; segment <= segments; segment += 1) {
    const t = segment / segments;
    const nextX = (1 - t) ** 2 * from.x + 2 * (1 - t) * t * control.x + t ** 2 * to.x;
    const nextY = (1 - t) ** 2 * from.y + 2 * (1 - t) * t * control.y + t ** 2 * to.y;
    context.lineWidth = from.width + (to.width - from.width) * (t - 0.5 / segments);
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
function applyStyle(context, stroke, colour) {
  context.globalCompositeOperation = stroke.tool === "eraser" ? "destination-out" : "source-over";
  context.strokeStyle = context.fillStyle = colour;
  context.lineCap = "round";
  context.lineJoin = "round";
}

/** @param {Context} context */
function resetStyle(context) {
  context.globalCompositeOperation = "source-over";
}

/**
 * @param {Point} a
 * @param {Point} b
 * @returns {Point}
 */
function midpoint(a, b) {
  return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, width: (a.width + b.width) / 2 };
}

/**
 * @param {OffscreenCanvas} canvas
 * @returns {OffscreenCanvasRenderingContext2D}
 */
function contextOf(canvas) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (context === null) throw new Error("this browser has no 2D canvas");
  return context;
}
