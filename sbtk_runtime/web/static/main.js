// The entry point: connects the canvas, the results and the viewer.

import { setUpCrop } from "./crop.js";
import { announce, byId, checkedValue, onRadioChange, resetRadios, setChecked, showToast } from "./dom.js";
import { Drawing } from "./drawing.js";
import { currentFilter, onFilterChange } from "./filters.js";
import { renderImage } from "./rendering.js";
import { IndexingMonitor, resultText, showProgress } from "./indexing.js";
import { photoIdAt } from "./results_grid.js";
import { ResultsPane } from "./results_pane.js";
import { exampleImage, showExamples } from "./examples.js";
import { ServerMonitor } from "./server_status.js";
import { restoreSketch, saveSketchOnExit } from "./session_store.js";
import { SketchPad } from "./sketch_pad.js";
import { setUpToolbar } from "./toolbar.js";
import { acceptImages, unusedText } from "./upload.js";
import { currentState, pushFeedback, pushState, regionText, takeTraced, urlState } from "./url_state.js";
import { Viewer } from "./viewer.js";

/** @typedef {import("./search.js").Query} Query */
/** @typedef {import("./region_frame.js").Region} Region */
/** @typedef {import("./upload.js").UploadedImage} UploadedImage */

resetRadios();
const drawing = new Drawing();
// Before anything listens to the drawing: what the URL shows stays.
await restoreSketch(drawing);
const [traced, strokes, input] = ["traced-layer", "strokes-layer", "input-layer"].map((id) => byId(id, HTMLCanvasElement));
const pad = new SketchPad({ traced, strokes, input }, drawing);
const monitor = new ServerMonitor();
const results = new ResultsPane(monitor, currentQuery);
const viewer = new Viewer(results.grid);
const indexing = new IndexingMonitor();

/** @type {UploadedImage | null} */
let image = null;

saveSketchOnExit(drawing);
setUpToolbar(pad, { toggleKind, focusResults, likeFocused });
acceptImages(addImage, showSimilar);
setUpCrop(drawing);
showExamples((strokes) => drawing.add(...strokes));

pad.addEventListener("draw", () => {
  hideSimilar();
  updateCanvasHint();
  results.schedule();
});
pad.addEventListener("cancel", () => results.run());
drawing.addEventListener("change", () => {
  performance.clearMarks("sbtk:drawn");
  performance.mark("sbtk:drawn");
  updateKind();
  hideSimilar();
  updateCanvasHint();
  results.run();
});
onRadioChange("as", () => results.run());
onFilterChange(() => results.run());
byId("similar-close", HTMLButtonElement).addEventListener("click", () => pushState({ likes: [], unlikes: [] }));
byId("skip-link", HTMLAnchorElement).addEventListener("click", (event) => {
  event.preventDefault(); // The fragment of the URL holds the state of the page.
  byId("results", HTMLElement).focus();
});
for (const source of [results.grid, viewer]) {
  source.addEventListener("like", (event) => showSimilar(/** @type {CustomEvent<number>} */ (event).detail));
}
viewer.addEventListener("unlike", (event) => showDissimilar(/** @type {CustomEvent<number>} */ (event).detail));
viewer.addEventListener("like-part", (event) => {
  const { id, region } = /** @type {CustomEvent<{ id: number, region: Region }>} */ (event).detail;
  pushState({ likes: [id], unlikes: [], region, photo: null });
  announce("Searching for photos like the marked part.");
});
results.grid.addEventListener("open", (event) => pushState({ photo: /** @type {CustomEvent<number>} */ (event).detail }));
urlState.addEventListener("change", applyUrlState);
monitor.addEventListener("change", watchIndexing);
indexing.addEventListener("change", showIndexing);

updateKind();
updateCanvasHint();
void traceExample();
applyUrlState();
void monitor.start();
void registerServiceWorker();

/** @returns {Query | null} null if there is nothing to search for */
function currentQuery() {
  const filter = currentFilter();
  const { likes, unlikes, region } = currentState();
  if (likes.length > 0) return { kind: "similar", likes, unlikes, region: region ? regionText(region) : "", filter };
  if (!drawing.isSearchable && !pad.isDrawing) return null;
  const kind = checkedValue("as") === "photo" ? "photo" : "sketch";
  return { image: () => renderImage(drawing, pad.unfinished), kind, unlikes, filter };
}

/**
 * @param {UploadedImage} uploaded
 * @param {number} others the number of files that came with it
 */
function addImage(uploaded, others) {
  drawing.add({ kind: "image", image: uploaded });
  showToast(`${uploaded.name}: searching with a ${uploaded.kind}. Trace draws over it.${unusedText(others)}`);
}

/** Puts the example that the URL names under the pen. */
async function traceExample() {
  const name = takeTraced();
  const traced = name === null ? null : await exampleImage(name);
  if (traced === null) return;
  drawing.add({ kind: "image", image: traced, isTraced: true });
  showToast("Trace the lines. Photos follow your pen.");
}

/** Sets the kind to the detected one when the image changes, and to sketch when there is no image. */
function updateKind() {
  if (drawing.image === image) return;
  image = drawing.image;
  setChecked("as", image?.kind ?? "sketch");
}

/** @param {number} id */
function showSimilar(id) {
  pushFeedback(id, true);
  announce("Searching for similar photos.");
}

/** @param {number} id */
function showDissimilar(id) {
  pushFeedback(id, false);
  announce("Searching for photos that are less like it.");
}

/** Returns to the sketch. Photos that are not liked stay excluded as long as there is a sketch. */
function hideSimilar() {
  const { likes, unlikes } = currentState();
  const isBlank = !drawing.isSearchable && !pad.isDrawing;
  if (likes.length > 0 || (unlikes.length > 0 && isBlank)) pushState({ likes: [], unlikes: [] });
}

function likeFocused() {
  const id = photoIdAt(document.activeElement);
  if (id !== null) showSimilar(id);
}

function toggleKind() {
  setChecked("as", checkedValue("as") === "sketch" ? "photo" : "sketch");
  announce(`Searching with a ${checkedValue("as")}.`);
  results.run();
}

function focusResults() {
  if (!results.grid.focusFirst()) announce("No photos yet.");
}

function updateCanvasHint() {
  byId("canvas", HTMLElement).classList.toggle("is-blank", drawing.visible.length === 0 && !pad.isDrawing);
}

function applyUrlState() {
  const { likes, unlikes, photo, region } = currentState();
  byId("sketch-panel", HTMLElement).classList.toggle("is-inactive", likes.length > 0);
  results.showSimilar(likes, unlikes, region ? regionText(region) : "");
  if (photo === null) {
    viewer.close();
  } else {
    viewer.open(photo);
    results.loadMoreAfter(photo);
  }
}

function showIndexing() {
  showProgress(indexing);
  const { state, isBusy, isConnected } = indexing;
  const result = isBusy || !isConnected ? "" : resultText(indexing);
  if (result !== "") showToast(result);
  // After one job the next may have begun, which the monitor does not report as a change.
  if (!isBusy || !isConnected || state?.generation !== monitor.health.generation) void monitor.check().then(watchIndexing);
}

function watchIndexing() {
  if (monitor.health.is_indexing) indexing.watch();
}

/** Makes the page installable, and lets it open while the server is stopped. */
async function registerServiceWorker() {
  // Available on HTTPS and localhost.
  if (!("serviceWorker" in navigator)) return;
  try {
    await navigator.serviceWorker.register("service-worker.js");
    const { active } = await navigator.serviceWorker.ready;
    const files = performance.getEntriesByType("resource").map(({ name }) => name);
    active?.postMessage([...new Set([new URL("./", location.href).href, ...files])]);
  } catch {
    // The page works without it.
  }
}
