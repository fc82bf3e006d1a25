// The page, put together: what is drawn or chosen becomes a question, and its answer a grid of photos.

import { announce, say } from "./announce.js";
import { Drawing } from "./drawing.js";
import { Finds } from "./finds.js";
import { walkWithArrows } from "./grid_keys.js";
import { Watch } from "./health.js";
import { takePictures } from "./intake.js";
import { keepSketch, restoreSketch } from "./keep.js";
import { drawWithKeys } from "./keyboard_pen.js";
import { byId, choose, chooseDefaults, chosen, onChoice } from "./page.js";
import { go, here, moves } from "./place.js";
import { drawWithPointers } from "./pointer_input.js";
import { idOf } from "./results.js";
import { sketchFile } from "./sketch_file.js";
import { SketchPad } from "./sketch_pad.js";
import { offerTools } from "./tools.js";
import { Viewer } from "./viewer.js";

/** @typedef {import("./picture.js").Picture} Picture */
/** @typedef {import("./search.js").Question} Question */

chooseDefaults();
const drawing = new Drawing();
restoreSketch(drawing);
const pad = new SketchPad(byId("ink", HTMLCanvasElement), byId("pen", HTMLCanvasElement), drawing);
const watch = new Watch();
const finds = new Finds(watch, question);
const viewer = new Viewer(finds.results);

/** @type {Picture | null} */
let picture = null;

keepSketch(drawing);
drawWithPointers(pad);
drawWithKeys(pad);
offerTools(pad, { switchKind, toResults, likeFocused });
walkWithArrows(finds.results.list);
takePictures(takePicture, like);

pad.addEventListener("draw", () => {
  leaveLike();
  showPaper();
  finds.askSoon();
});
pad.addEventListener("drop", () => finds.ask());
drawing.addEventListener("change", () => {
  performance.clearMarks("sbtk:drawn");
  performance.mark("sbtk:drawn");
  followPicture();
  leaveLike();
  showPaper();
  finds.ask();
});
onChoice("as", () => finds.ask());
byId("folder", HTMLSelectElement).addEventListener("change", () => finds.ask());
byId("like-leave", HTMLButtonElement).addEventListener("click", leaveLike);
byId("skip", HTMLAnchorElement).addEventListener("click", (event) => {
  event.preventDefault(); // What follows # in the address says what is shown.
  byId("finds", HTMLElement).focus();
});
for (const source of [finds.results, viewer]) {
  source.addEventListener("like", (event) => like(/** @type {CustomEvent<number>} */ (event).detail));
}
finds.results.addEventListener("open", (event) => go({ photo: /** @type {CustomEvent<number>} */ (event).detail }));
moves.addEventListener("change", showPlace);

showPaper();
showPlace();
void watch.start();

/** @returns {Question | null} what is looked for now */
function question() {
  const under = byId("folder", HTMLSelectElement).value;
  const { like } = here();
  if (like !== null) return { like, under };
  if (drawing.visible.length === 0 && !pad.isDrawing) return null;
  const kind = chosen("as") === "photo" ? "photo" : "sketch";
  return { image: () => sketchFile(drawing, pad.unfinished), kind, under };
}

/** @param {Picture} taken */
function takePicture(taken) {
  drawing.add({ kind: "picture", picture: taken });
  say(`${taken.name} is taken as a ${taken.looksLike}.`);
}

/** What the switch says goes for one picture: the next is judged anew, and a blank paper is for sketches. */
function followPicture() {
  if (drawing.picture === picture) return;
  picture = drawing.picture;
  choose("as", picture?.looksLike ?? "sketch");
}

/** @param {number} id */
function like(id) {
  go({ like: id, photo: null });
  announce("Looking for photos like this one.");
}

function leaveLike() {
  if (here().like !== null) go({ like: null });
}

function likeFocused() {
  const id = idOf(document.activeElement);
  if (id !== null) like(id);
}

function switchKind() {
  choose("as", chosen("as") === "sketch" ? "photo" : "sketch");
  announce(`Searching with a ${chosen("as")}.`);
  finds.ask();
}

function toResults() {
  const first = finds.results.list.querySelector("a");
  if (first === null) announce("There are no photos yet.");
  else first.focus();
}

function showPaper() {
  byId("paper", HTMLElement).classList.toggle("is-blank", drawing.visible.length === 0 && !pad.isDrawing);
}

/** Shows what the address says: photos like one, and one photo large. */
function showPlace() {
  const { like: id, photo } = here();
  byId("desk", HTMLElement).classList.toggle("is-aside", id !== null);
  finds.showLike(id);
  if (photo === null) viewer.close();
  else viewer.open(photo);
}
