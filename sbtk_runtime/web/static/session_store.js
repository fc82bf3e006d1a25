// What survives a reload: the drawing, in the session storage of the tab, and the command that starts the server.

import { showToast } from "./dom.js";
import { loadImage } from "./upload.js";

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./drawing.js").ImageMark} ImageMark */
/** @typedef {import("./drawing.js").Stroke} Stroke */
/** @typedef {{ url: string, name: string, kind: "sketch" | "photo", isTraced: boolean }} SavedImage */

const SKETCH_KEY = "sbtk-sketch";
const COMMAND_KEY = "sbtk-command";
// Strokes are not rounded: a sketch that comes back finds the same photos. Browsers permit some 5 million.
const MAX_CHARACTERS = 2_500_000;
// Saved instead of a drawing that is larger.
const TOO_LARGE = JSON.stringify("too large");

/**
 * Saves the drawing when the page is left. Phones end pages that are hidden without telling them.
 * @param {Drawing} drawing
 */
export function saveSketchOnExit(drawing) {
  const save = () => {
    for (const text of savedTexts(drawing)) {
      if (text.length <= MAX_CHARACTERS && store(text)) return;
    }
    store(TOO_LARGE);
  };
  window.addEventListener("pagehide", save);
  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "hidden") save();
  });
}

/**
 * @param {string} text
 * @returns {boolean} false if storage is blocked or full
 */
function store(text) {
  try {
    sessionStorage.setItem(SKETCH_KEY, text);
    return true;
  } catch {
    return false;
  }
}

/**
 * Yields texts that restore the drawing, the most exact one first.
 * @param {Drawing} drawing
 */
function* savedTexts({ visible }) {
  const strokes = visible.filter((mark) => mark.kind === "stroke");
  const [first] = visible;
  if (first?.kind !== "image") {
    yield JSON.stringify({ strokes, image: null });
    return;
  }
  // A drawing on paper that was photographed is several times as large as PNG.
  if (first.image.kind === "sketch") yield JSON.stringify({ strokes, image: savedImage(first, "image/png") });
  yield JSON.stringify({ strokes, image: savedImage(first, "image/webp") });
}

/**
 * @param {ImageMark} mark
 * @param {string} type
 * @returns {SavedImage}
 */
function savedImage({ image: { pixels, name, kind }, isTraced = false }, type) {
  return { url: pixels.toDataURL(type, 0.92), name, kind, isTraced };
}

/**
 * Restores the saved drawing.
 * @param {Drawing} drawing
 */
export async function restoreSketch(drawing) {
  try {
    const saved = sessionStorage.getItem(SKETCH_KEY) ?? "{}";
    if (saved === TOO_LARGE) {
      showToast("The sketch was too large to keep while the page reloaded.");
      return;
    }
    const { strokes, image } = JSON.parse(saved);
    const isOurs = Array.isArray(strokes) && strokes.every(isStroke);
    if (!isOurs) return;
    if (image === null) {
      drawing.add(...strokes);
      return;
    }
    const { name, kind, isTraced } = /** @type {SavedImage} */ (image);
    const uploaded = await loadImage(fileOf(image));
    drawing.add({ kind: "image", image: { ...uploaded, name, kind }, isTraced }, ...strokes);
  } catch {
    // Storage is blocked or its content is invalid: start with an empty canvas.
  }
}

/**
 * @param {SavedImage} image
 * @returns {File}
 */
function fileOf({ url, name }) {
  const [head, content] = url.split(",");
  const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
  return new File([bytes], name, { type: head.slice("data:".length, head.indexOf(";")) });
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
