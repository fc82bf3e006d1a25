// Pictures from outside: chosen, pasted, or dropped on the page.

import { BadPicture, TYPES, pictureFrom } from "./picture.js";
import { say } from "./announce.js";
import { byId } from "./page.js";
import { PHOTO_TYPE } from "./results.js";

/** @typedef {import("./picture.js").Picture} Picture */

// Firefox sends dragover every 350 ms, others more often.
const OVER_MS = 600;

/**
 * @param {(picture: Picture) => void} took
 * @param {(id: number) => void} tookPhoto a photo of the gallery was dropped
 */
export function takePictures(took, tookPhoto) {
  const chooser = byId("chooser", HTMLInputElement);
  chooser.accept = TYPES.join(",");
  byId("upload", HTMLButtonElement).addEventListener("click", () => chooser.click());
  chooser.addEventListener("change", () => {
    void take(chooser.files?.[0], took);
    chooser.value = ""; // So that the same file can be chosen again.
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length > 0) event.preventDefault();
    if (files.length > 0) void take(files.find(({ type }) => TYPES.includes(type)) ?? files[0], took);
  });
  acceptDrops((event) => {
    const id = event.dataTransfer?.getData(PHOTO_TYPE);
    if (id) tookPhoto(Number(id));
    else void take(event.dataTransfer?.files[0], took);
  });
}

let taken = 0;

/**
 * @param {File | undefined} file
 * @param {(picture: Picture) => void} took not called where another file was brought meanwhile
 */
async function take(file, took) {
  if (file === undefined) {
    say("Only picture files can be dropped here.");
    return;
  }
  taken += 1;
  const mine = taken;
  try {
    const picture = await pictureFrom(file);
    if (mine === taken) took(picture);
  } catch (error) {
    if (mine === taken) say(error instanceof BadPicture ? error.message : "That picture cannot be opened.");
  }
}

/** @param {(event: DragEvent) => void} dropped */
function acceptDrops(dropped) {
  const root = document.documentElement;
  /** @type {number | undefined} */
  let leaving;
  const show = (/** @type {boolean} */ isOver) => {
    clearTimeout(leaving);
    root.classList.toggle("is-dropping", isOver);
  };
  document.addEventListener("dragover", (event) => {
    if (!isWanted(event)) return;
    event.preventDefault();
    if (event.dataTransfer) event.dataTransfer.dropEffect = "copy";
    show(true);
    // dragover comes as long as something is held over the page. What leaves is not always told:
    // the photo it was over may be gone.
    leaving = setTimeout(() => show(false), OVER_MS);
  });
  document.addEventListener("drop", (event) => {
    show(false);
    if (!isWanted(event)) return;
    event.preventDefault();
    dropped(event);
  });
}

/** @param {DragEvent} event */
function isWanted(event) {
  const types = event.dataTransfer?.types ?? [];
  return types.includes("Files") || types.includes(PHOTO_TYPE);
}
