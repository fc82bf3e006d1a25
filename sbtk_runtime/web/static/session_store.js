// What survives a reload: the strokes, in the session storage of the tab, and the command that starts the server.
// Images are not kept.

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./drawing.js").Stroke} Stroke */

const SKETCH_KEY = "sbtk-sketch";
const COMMAND_KEY = "sbtk-command";
// Strokes are not rounded: a sketch that comes back finds the same photos. Browsers permit some 5 million.
const MAX_CHARACTERS = 2_500_000;

/**
 * Saves the strokes when the page is closed or reloaded.
 * @param {Drawing} drawing
 */
export function saveSketchOnExit(drawing) {
  window.addEventListener("pagehide", () => {
    const strokes = drawing.visible.filter((mark) => mark.kind === "stroke");
    const text = drawing.image === null && strokes.length > 0 ? JSON.stringify(strokes) : "";
    try {
      if (text !== "" && text.length <= MAX_CHARACTERS) sessionStorage.setItem(SKETCH_KEY, text);
      else sessionStorage.removeItem(SKETCH_KEY);
    } catch {
      // Storage is blocked or full: the sketch is not restored.
    }
  });
}

/**
 * Restores saved strokes.
 * @param {Drawing} drawing
 */
export function restoreSketch(drawing) {
  try {
    const strokes = JSON.parse(sessionStorage.getItem(SKETCH_KEY) ?? "[]");
    if (Array.isArray(strokes)) drawing.add(...strokes.filter(isStroke));
  } catch {
    // Storage is blocked or its content is invalid: start with an empty canvas.
  }
}

/** @param {string} command that starts the server */
export function saveCommand(command) {
  try {
    localStorage.setItem(COMMAND_KEY, command);
  } catch {
    // Storage is blocked: a page opened while the server is stopped shows the command without options.
  }
}

/** @returns {string} */
export function loadCommand() {
  try {
    return localStorage.getItem(COMMAND_KEY) ?? "sbtk serve";
  } catch {
    return "sbtk serve";
  }
}

/**
 * @param {any} value
 * @returns {value is Stroke}
 */
function isStroke(value) {
  return (
    value?.kind === "stroke" &&
    (value.tool === "pen" || value.tool === "eraser") &&
    Array.isArray(value.points) &&
    value.points.length > 0 &&
    value.points.every((/** @type {any} */ point) => [point?.x, point?.y, point?.width].every(Number.isFinite))
  );
}
